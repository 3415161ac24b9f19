"""`autoprune methods`: what there is to choose from."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterator
from typing import Any, cast

from rich.console import Console
from rich.padding import Padding
from rich.table import Table

from ..methods import METHODS, check_name
from .report import print_json

_SECTIONS = ("Args:", "Raises:")


def options(name: str) -> dict[str, Any]:
    """A method's options beside the budget, with their defaults."""
    fields = dataclasses.fields(cast(Any, METHODS[name]))
    return {field.name: field.default for field in fields if field.name != "budget"}


def describe(name: str) -> dict[str, Any]:
    """Name, first sentence, paper and options with their defaults of a method."""
    return {
        "name": name,
        "summary": _documentation(name).split("\n")[0],
        "paper": METHODS[name].paper,
        "options": options(name),
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
    for indent, paragraph in _paragraphs(_documentation(name)):
        console.print(Padding(paragraph, (0, 0, 0, indent)))
    console.print(f"Paper: {METHODS[name].paper}")
    console.print()
    for option, default in options(name).items():
        console.print(f"--set {option}={default}")


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


def _documentation(name: str) -> str:
    return inspect.getdoc(METHODS[name]) or ""
