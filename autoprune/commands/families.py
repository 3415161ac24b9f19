"""`autoprune families`: which models are supported, and what stands behind it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from ..families import CHECKS, FAMILIES, SCORES, Check, Family
from .report import WIDE, print_json

_NARROW = ("family", "model type", "prompts", "vision scores")
_USUAL = (*_NARROW, "attention tried", "generation tried", "note")
"""What a terminal shows that is too narrow for the next columns; README and --json have them all."""
_WIDEST = 170


def families(console: Console, as_json: bool, as_markdown: bool) -> None:
    """Print one row per family, then what was checked.

    Raises:
        ValueError: both formats are asked for.
    """
    if as_json and as_markdown:
        raise ValueError("--json and --markdown are two formats; choose one of them")
    if as_json:
        print_json(console, [describe(family) for family in FAMILIES])
    elif as_markdown:
        print(markdown())
    else:
        _print_table(console)


def _print_table(console: Console) -> None:
    heading, *body = rows()
    wanted = _NARROW if console.width < WIDE else _USUAL if console.width < _WIDEST else heading
    shown = [n for n, title in enumerate(heading) if title in wanted]
    table = Table(show_edge=False, pad_edge=False)
    for title in (heading[n] for n in shown):
        table.add_column(title, no_wrap=title in heading[:3])
    for row in body:
        table.add_row(*(row[n] for n in shown))
    console.print(table)
    console.print("What is checked, on tiny random models:")
    for line in checks():
        console.print(f"* {line}")
    console.print("A checkpoint of each to try: `autoprune families --json`, or the README.")
    console.print("Other families may work; entering the context then warns. See docs/families.md.")


def describe(family: Family) -> dict[str, Any]:
    """A row as a record for JSON, with the checks that stand behind it."""
    return {
        "name": family.name,
        "title": family.title,
        "model_type": family.model_type,
        "checkpoint": family.checkpoint,
        "media": list(family.media),
        "vision_scores": SCORES[family.vision],
        "backends": list(family.backends),
        "generation": generation(family),
        "note": family.note,
        "checks": {check.name: check.shows for check in CHECKS if check.covers(family)},
    }


def generation(family: Family) -> str:
    """The ways of generating that are tried on this very family."""
    if family.every_mode:
        return "every mode"
    return "greedy, in the core" if family.core else "greedy"


def rows() -> list[tuple[str, ...]]:
    """The table for readers: a heading, then one row per family."""
    table: list[tuple[str, ...]] = [
        (
            "family",
            "model type",
            "for example",
            "prompts",
            "vision scores",
            "attention tried",
            "generation tried",
            "note",
        )
    ]
    for family in FAMILIES:
        media = "images, video" if family.video else "images"
        table.append(
            (
                family.title,
                family.model_type,
                family.checkpoint,
                media,
                SCORES[family.vision],
                ", ".join(family.backends),
                generation(family),
                family.note,
            )
        )
    return table


def checks() -> list[str]:
    """A sentence for each check: what it shows, and of which families."""
    return [f"{check.name}: {check.shows} ({_scope(check)})" for check in CHECKS]


def markdown(tests: Mapping[str, str] | None = None) -> str:
    """The table and its checks as Markdown.

    Args:
        tests: the file behind each check, by its name, to link to; default: no links.
    """
    heading, *body = rows()
    table = [heading, tuple("---" for _ in heading), *body]
    lines = ["| " + " | ".join(row) + " |" for row in table]
    links = {name: f", [test]({file})" for name, file in (tests or {}).items()}
    listed = [
        f"* {check.name}: {check.shows} ({_scope(check)}{links.get(check.name, '')})"
        for check in CHECKS
    ]
    return "\n".join([*lines, "", "What is checked, on tiny random models:", "", *listed])


def _scope(check: Check) -> str:
    covered = [family.title for family in FAMILIES if check.covers(family)]
    others = [family.title for family in FAMILIES if not check.covers(family)]
    if len(covered) <= len(others):
        return ", ".join(covered)
    return f"every family but {', '.join(others)}" if others else "every family"
