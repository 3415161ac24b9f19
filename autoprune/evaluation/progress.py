"""The bar on stderr that says how much is left."""

from __future__ import annotations

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

_MINUTES = 5
"""Settings differ in speed, so the remaining time is guessed from so long a stretch."""


def progress_bar(shown: bool) -> Progress:
    """A bar with the time left; nothing is seen of it if it is not `shown`."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        disable=not shown,
        speed_estimate_period=_MINUTES * 60,
    )
