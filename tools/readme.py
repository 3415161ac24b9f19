"""Write what the documentation repeats from the code: `make readme`.

The table of families goes into the README, the page of methods to docs/methods.md.
"""

from __future__ import annotations

import dataclasses
import inspect
import itertools
import re
import sys
import textwrap
from pathlib import Path

from autoprune import families
from autoprune.commands.methods import documentation
from autoprune.methods import METHODS

START = "<!-- families: written by `make readme` -->"
END = "<!-- end of families -->"

METHODS_HEAD = """# Methods

<!-- written by `make readme` from the methods' docstrings -->

Every method spends the budget that it is given: the mean number of visual tokens that *enter* a decoder layer,
which is what FLOPs and the KV cache see ([budget.md](budget.md)). `AutoPrune` spends it exactly; a method
whose schedule has a fixed shape takes the nearest from below, and the trace says what was spent. What a method
cannot spend at all (a cut after layer 2 has to pay for two full layers) is refused with the smallest budget
that works.

Layers are stated for 32 layers and rescaled to the model's depth. `autoprune.create(name, budget=...)` builds
a method, `autoprune compare` puts them side by side ([compare.md](compare.md)), [adaptivity.md](adaptivity.md)
says how they fare on the embedded model. Each was written from its paper, and each says how it differs from
its authors' code, and with which of its options it comes closest to it (*as released*; `autoprune compare
--methods all,released` has those rows, too). [CONTRIBUTING.md](../CONTRIBUTING.md) shows how to add one.
"""


def with_table(text: str) -> str:
    """`text` with the present table between the two markers.

    Raises:
        ValueError: the markers are not there, each once and in this order.
    """
    before, start, rest = text.partition(START)
    _, end, after = rest.partition(END)
    if not start or not end or START in rest or END in before + after:
        raise ValueError(f"expected one line {START!r} and, behind it, one line {END!r}")
    return f"{before}{START}\n\n{families.markdown()}\n\n{END}{after}"


def methods_page() -> str:
    """docs/methods.md: a section for each method, from its docstring, paper and options."""
    sections = [METHODS_HEAD, _index()]
    for name, method in METHODS.items():
        text, _, arguments = documentation(name).partition("\n\nArgs:\n")
        options = [
            f"`{field.name}={field.default!r}`"
            for field in dataclasses.fields(method)
            if field.name != "budget"
        ]
        sections += [
            f"## {name}\n",
            f"*{_linked(method.paper)}*\n",
            text + "\n",
            *([f"Options: {', '.join(options)}\n", _arguments(arguments)] if options else []),
        ]
        if method.released:
            released = (f"`{option}={value!r}`" for option, value in method.released.items())
            sections.append(f"As released: {', '.join(released)}\n")
    return "\n".join(sections).rstrip() + "\n"


def _index() -> str:
    lines = ["| method | |", "|---|---|"]
    for name, method in METHODS.items():
        summary = (inspect.getdoc(method) or "").partition("\n")[0]
        lines.append(f"| [{name}](#{name}) | {summary} |")
    return "\n".join([*lines, ""])


def _arguments(text: str) -> str:
    """The Args section, which is indented, as a list without the budget."""
    lines = itertools.takewhile(lambda line: line.startswith(" "), text.split("\n"))
    text = textwrap.dedent("\n".join(lines))
    entries = re.split(r"\n(?=\S)", text)
    items = [" ".join(entry.split()) for entry in entries if not entry.startswith("budget:")]
    named = (item.partition(": ") for item in items if item)
    return "\n".join([*(f"* `{name}`: {rest}" for name, _, rest in named), ""])


def _linked(paper: str) -> str:
    return re.sub(r"arxiv\.org/abs/([\d.]+\d)", r"[arXiv:\1](https://arxiv.org/abs/\1)", paper)


if __name__ == "__main__":
    readme = Path(sys.argv[1])
    readme.write_text(with_table(readme.read_text(encoding="utf-8")), encoding="utf-8")
    page = readme.parent / "docs" / "methods.md"
    if page.parent.is_dir():
        page.write_text(methods_page(), encoding="utf-8")
