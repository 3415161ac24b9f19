"""How results look in a terminal and in JSON."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from decimal import Decimal
from typing import TYPE_CHECKING, Any

from rich.console import Console

if TYPE_CHECKING:
    from ..trace import Sample

_LEVELS = " ▁▂▃▄▅▆▇█"
_EIGHTHS = ("", "▏", "▎", "▍", "▌", "▋", "▊", "▉")
_ASCII_LEVELS = " .:-=+*#@"

WIDE = 100
"""Characters of a terminal from which on tables show all of their columns."""


def sparkline(counts: Sequence[int], top: int, unicode: bool = True) -> str:
    """One character per layer, its height the square root of the share of `top` tokens.

    The root keeps the small counts of deep layers apart beside layer 0, which sees all tokens.
    """
    levels = _LEVELS if unicode else _ASCII_LEVELS
    steps = len(levels) - 1
    return "".join(
        levels[0 if count == 0 else max(1, round(steps * (count / max(top, 1)) ** 0.5))]
        for count in counts
    )


def can_draw(console: Console) -> bool:
    """Whether the terminal's encoding has block characters."""
    return console.encoding.lower().replace("-", "").startswith("utf")


def bar(count: int, top: int, width: int = 40, unicode: bool = True) -> str:
    """A horizontal bar of `count` out of `top`, exact to an eighth of a character."""
    if not unicode:
        return "#" * max(round(width * count / max(top, 1)), min(count, 1))
    whole, eighths = divmod(max(round(8 * width * count / max(top, 1)), min(count, 1)), 8)
    return "█" * whole + _EIGHTHS[eighths]


def saved(spent: float, full: float) -> str:
    """How much less was spent, as a percentage."""
    return f"{1 - spent / full:.1%}" if full else "0.0%"


def bits(value: float | None) -> str:
    """Mutual information, or a dash where none was measured."""
    return "-" if value is None else f"{value:.3f}"


def sample_record(sample: Sample) -> dict[str, Any]:
    """One prompt for JSON; `kept` lists the original visual tokens entering each layer."""
    record = sample.to_dict()
    del record["visual_positions"]
    return {**record, "mean_tokens": sample.mean_tokens}


def print_json(console: Console, record: Any) -> None:
    """One line of JSON, neither wrapped nor coloured."""
    console.out(json.dumps(record, allow_nan=False, default=str), highlight=False)


def as_options(message: str, budget: str = "--budget ", setting: str = "--set ") -> str:
    """An error's advice in the words of the command line instead of those of Python.

    Args:
        budget, setting: what stands before a budget, and before an option as "name=value".
    """
    tokens = r'Budget\.tokens\(([\d.e+-]+)(?:, counted="leaving")?\)'
    message = re.sub(tokens, rf"{budget}\1", message)
    message = re.sub(
        r"Budget\.ratio\(([\d.e+-]+)\)",
        lambda found: f"{budget}{(100 * Decimal(found[1])).normalize():f}%",
        message,
    )
    return re.sub(r'\bset (\w+)="(\w+)"', rf"give {setting}\1=\2", message)
