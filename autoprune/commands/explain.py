"""`autoprune explain`: one prompt in pictures, and a page of them."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console

from ..files import check_file, make_folder, write_whole
from ..viz import animate_kept, matplotlib_parts, to_png
from .explain_page import explanation_page
from .explanation import Bits, ExplainRequest, figures, measure
from .report import print_json
from .run import record, show


def explain(request: ExplainRequest, console: Console) -> None:
    """Answer the question with all and with pruned visual tokens, and draw what happened.

    Raises:
        ValueError: bad input; see `load_image` and `load_model`.
        UnsupportedError: a model that cannot be pruned.
        ImportError: matplotlib is missing.
    """
    matplotlib_parts()
    if not request.question.strip():
        raise ValueError("the question is empty")
    folder = make_folder(request.output)
    if request.report is not None:
        check_file(request.report)
    found = measure(request)
    drawn = {name: to_png(figure) for name, figure in figures(found, request.dark).items()}
    files = {f"{name}.png": content for name, content in drawn.items()}
    if found.views:
        files["kept.webp"] = animate_kept(found.views, found.sample, dark=request.dark)
    for name, content in files.items():
        write_whole(folder / name, content)
    if request.report is not None:
        write_whole(request.report, explanation_page(found, files.get("kept.webp")))
    paths = [str(folder / name) for name in files]
    if request.as_json:
        written = record(request, found.loaded, found.image, found.pruned, found.sample, found.full)
        if request.others:
            written["images"] = [str(request.image), *request.others]
        written |= {"files": paths, "attention": found.looked.attention.tolist()}
        written |= {} if request.report is None else {"report": str(request.report)}
        print_json(console, written)
        return
    show(request, found.loaded, found.pruned, found.sample, found.full, console)
    if found.no_views:
        console.print(found.no_views)
    for path in [*paths, *([] if request.report is None else [request.report])]:
        console.print(f"wrote {path}", soft_wrap=True)


def parse_layers(text: str | None) -> list[int] | None:
    """The layers of "0, 2, 5"; None if none are asked for.

    Raises:
        ValueError: one of them is no whole number.
    """
    if text is None:
        return None
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(
            f"--layers takes whole numbers by commas, such as 1,6,11, got {text!r}"
        ) from None


def parse_reference(text: str | None) -> Bits | None:
    """The least and the most information of "0.1,0.9".

    Raises:
        ValueError: these are not two numbers, 0 or more, the smaller one first.
    """
    if text is None:
        return None
    try:
        least, most = (float(part) for part in text.split(","))
    except ValueError:
        least, most = 1.0, 0.0
    if not 0 <= least <= most < float("inf"):
        raise ValueError(
            "--reference takes the least and the most information of other prompts in bits, such as 0.1,0.9, "
            f"got {text!r}"
        )
    return least, most


def command_line(options: Mapping[str, Any], images: Sequence[str], question: str) -> str:
    """The call as one would type it.

    Args:
        options: by their names with dashes; None and False are left out, and lists are repeated.
    """
    words = ["autoprune", "explain"]
    for option, value in options.items():
        if value is True:
            words.append(option)
        elif value is not None and value is not False:
            for one in value if isinstance(value, (list, tuple)) else [value]:
                words += [option, str(one)]
    return shlex.join([*words, "--", *images, question])
