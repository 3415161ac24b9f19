"""One self-contained page: style and pictures are inside, and nothing is loaded from anywhere.

Every text that is handed in is escaped. The page works without JavaScript; with it, tables can be sorted.
"""

from __future__ import annotations

import base64
import html
from collections.abc import Iterable, Sequence

_STYLE = """
:root { color-scheme: light dark; --paper: #ffffff; --ink: #212529; --faint: #6c757d; --line: #dee2e6;
  --soft: #f6f8fa; --mark: #0072b2; }
@media (prefers-color-scheme: dark) { :root { --paper: #161b22; --ink: #e6edf3; --faint: #9aa4ae;
  --line: #30363d; --soft: #21262d; --mark: #56b4e9; } }
body { background: var(--paper); color: var(--ink); font: 16px/1.5 system-ui, sans-serif;
  max-width: 68rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2.2rem; }
img { max-width: 100%; height: auto; }
figure { margin: 1rem 0; } td figure { margin: 0; } figcaption { color: var(--faint); font-size: .9rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .92rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .7rem; border-bottom: 1px solid var(--line); text-align: right; vertical-align: top; }
th:first-child, td:first-child, .texts td, .texts th { text-align: left; overflow-wrap: anywhere; }
thead th { background: var(--soft); } th button { all: unset; cursor: pointer; font-weight: 600; }
th button:focus-visible { outline: 2px solid var(--mark); }
th[aria-sort] button { color: var(--mark); }
pre { background: var(--soft); padding: .7rem; overflow-x: auto; white-space: pre-wrap; }
"""

# The order is read from data-value where a cell has one: a number as it is, or the text.
_SORTING = """
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") !== "descending";
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const value = (row) => row.cells[column].dataset.value ?? row.cells[column].textContent;
      const number = (row) => (value(row) === "" ? NaN : Number(value(row)));
      const compare = (a, b) => {
        const [x, y] = [number(a), number(b)];
        if (isNaN(x) && isNaN(y)) return value(a).localeCompare(value(b));
        if (isNaN(x) || isNaN(y)) return isNaN(x) ? (down ? -1 : 1) : (down ? 1 : -1);
        return x - y;
      };
      const rows = [...table.tBodies[0].rows].sort(compare);
      table.tBodies[0].append(...(down ? rows.reverse() : rows));
    });
  });
}
"""


class Html(str):
    """Text that is HTML already, so that it is not escaped again."""


def page(title: str, parts: Iterable[Html]) -> str:
    """The whole page of a title and its parts."""
    body = "\n".join(parts)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escaped(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n"
        f"<h1>{escaped(title)}</h1>\n{body}\n</main>\n<script>{_SORTING}</script>\n</body>\n</html>\n"
    )


def escaped(text: object) -> Html:
    """A text as it is read, whatever it holds; `Html` stays as it is."""
    return text if isinstance(text, Html) else Html(html.escape(str(text)))


def heading(text: object) -> Html:
    return Html(f"<h2>{escaped(text)}</h2>")


def paragraph(text: object) -> Html:
    return Html(f"<p>{escaped(text)}</p>")


def code(text: object) -> Html:
    """What can be copied as it stands, such as a command."""
    return Html(f"<pre><code>{escaped(text)}</code></pre>")


def picture(light: bytes, words: str, caption: object = "", dark: bytes | None = None) -> Html:
    """A picture inside the page.

    Args:
        light: a PNG, JPEG or WebP.
        words: what it shows, for those who do not see it.
        caption: below it; none if empty.
        dark: the same picture for readers whose system is dark.
    """
    image = f'<img src="{_address(light)}" alt="{escaped(words)}">'
    if dark is not None:
        source = f'<source media="(prefers-color-scheme: dark)" srcset="{_address(dark)}">'
        image = f"<picture>{source}{image}</picture>"
    below = f"<figcaption>{escaped(caption)}</figcaption>" if caption else ""
    return Html(f"<figure>{image}{below}</figure>")


def table(
    head: Sequence[object],
    rows: Iterable[Sequence[object]],
    values: Sequence[Sequence[object]] | None = None,
    texts: bool = False,
) -> Html:
    """A table.

    Args:
        head: of each column; none if empty.
        rows: cells as they are read.
        values: by which each cell is sorted, of the shape of `rows`; None for an empty one. Without values the
            table cannot be sorted.
        texts: columns hold texts rather than figures.
    """
    lines = []
    for number, row in enumerate(rows):
        keys = [""] * len(row)
        if values is not None:
            keys = [
                f' data-value="{escaped("" if value is None else value)}"'
                for value in values[number]
            ]
        cells = (f"<td{key}>{escaped(cell)}</td>" for key, cell in zip(keys, row, strict=True))
        lines.append(f"<tr>{''.join(cells)}</tr>")
    names = [name for name, is_so in (("sortable", values is not None), ("texts", texts)) if is_so]
    attribute = f' class="{" ".join(names)}"' if names else ""
    top = "".join(f'<th scope="col">{escaped(name)}</th>' for name in head)
    first = f"<thead><tr>{top}</tr></thead>" if head else ""
    body = "\n".join(lines)
    return Html(
        f'<div class="wide"><table{attribute}>{first}<tbody>\n{body}\n</tbody></table></div>'
    )


def _address(content: bytes) -> str:
    kinds = ((b"\x89PNG", "png"), (b"\xff\xd8", "jpeg"), (b"RIFF", "webp"))
    kind = next((name for start, name in kinds if content.startswith(start)), None)
    if kind is None:
        raise ValueError("a page takes pictures as PNG, JPEG or WebP, got another format")
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
