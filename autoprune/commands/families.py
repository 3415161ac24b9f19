"""`autoprune families`: which models are supported, and what stands behind it."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from .. import families as source
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
        print_json(console, [source.describe(family) for family in source.FAMILIES])
    elif as_markdown:
        print(source.markdown())
    else:
        _print_table(console)


def _print_table(console: Console) -> None:
    heading, *body = source.rows()
    wanted = _NARROW if console.width < WIDE else _USUAL if console.width < _WIDEST else heading
    shown = [n for n, title in enumerate(heading) if title in wanted]
    table = Table(show_edge=False, pad_edge=False)
    for title in (heading[n] for n in shown):
        table.add_column(title, no_wrap=title in heading[:3])
    for row in body:
        table.add_row(*(row[n] for n in shown))
    console.print(table)
    console.print("What is checked, on tiny random models:")
    for line in source.checks():
        console.print(f"* {line}")
    console.print("A checkpoint of each to try: `autoprune families --json`, or the README.")
    console.print("Other families may work; entering the context then warns. See docs/families.md.")
