"""`autoprune methods`: what there is to choose from."""

from __future__ import annotations

import inspect
import itertools
import re
from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.padding import Padding
from rich.table import Table

from ..methods import METHODS, as_released, check_name, options_of
from .report import print_json

_SECTIONS = ("Args:", "Raises:")


def options(name: str) -> dict[str, Any]:
    """A method's options beside the budget, with their defaults."""
    return {option: field.default for option, field in options_of(name).items()}


def describe(name: str) -> dict[str, Any]:
    """Name, first sentence, paper, options with their defaults and settings as released of a method."""
    return {
        "name": name,
        "summary": documentation(name).split("\n")[0],
        "paper": METHODS[name].paper,
        "options": options(name),
        "released": dict(METHODS[name].released),
    }


def methods(console: Console, as_json: bool) -> None:
    """Print one row per method."""
    records = [describe(name) for name in METHODS]
    if as_json:
        print_json(console, records)
        return
    table = Table()
    for heading in ("method", "what it does", "paper"):
        table.add_column(heading, overflow="fold", no_wrap=heading == "method")
    for record in records:
        table.add_row(record["name"], record["summary"], record["paper"])
    console.print(table)
    console.print("`autoprune methods NAME` explains one of them and its options.")


def explain(name: str, console: Console, as_json: bool) -> None:
    """Print what a method does, and its options with their defaults.

    Raises:
        ValueError: there is no such method.
    """
    check_name(name)
    if as_json:
        print_json(console, describe(name))
        return
    for indent, paragraph in _paragraphs(documentation(name)):
        console.print(Padding(paragraph, (0, 0, 0, indent)))
    console.print(f"Paper: {METHODS[name].paper}")
    console.print()
    for option, default in options(name).items():
        console.print(f"--set {option}={default}")
    if METHODS[name].released:
        console.print("As released: " + " ".join(f"--set {s}" for s in as_released(name)))


def _paragraphs(text: str) -> Iterator[tuple[int, str]]:
    """What a docstring says, line breaks within a paragraph or an argument undone, with its indentation."""
    lines: list[str] = []
    for line in [*text.split("\n"), ""]:
        indent = len(line) - len(line.lstrip())
        starts = not line.strip() or (lines and indent <= _indent(lines[0]) and indent > 0)
        if lines and (starts or line.rstrip() in _SECTIONS or lines[0] in _SECTIONS):
            yield _indent(lines[0]), " ".join(map(str.strip, lines))
            lines = []
        if line.strip():
            lines.append(line)
        else:
            yield 0, ""


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip())


def documentation(name: str) -> str:
    """A method's docstring; options of its base classes that it does not explain itself are added."""
    method = METHODS[name]
    text = inspect.getdoc(method) or ""
    explained = _arguments(text)
    own = options_of(name)
    added = {
        option: entry
        for base in reversed(method.__mro__[1:])
        for option, entry in _arguments(inspect.cleandoc(base.__doc__ or "")).items()
        if option in own and option not in explained
    }
    return "\n".join([text, *added.values()]) if explained else text


def _arguments(text: str) -> dict[str, str]:
    """The entries of a docstring's Args section, as they stand there, by argument."""
    _, _, section = text.partition("\n\nArgs:\n")
    lines = itertools.takewhile(lambda line: line.startswith(" "), section.split("\n"))
    entries = [entry for entry in re.split(r"\n(?=    \S)", "\n".join(lines)) if entry]
    return {name.strip(): entry for entry in entries for name in entry.partition(":")[0].split(",")}
