"""Measured speed-up of the prefill against what its FLOPs promise."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..viz import COLOURS, matplotlib_parts
from .results import Row

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_DASHES = ("-", "--", ":", "-.")


def plot_speedups(rows: Sequence[Row], title: str) -> Figure:
    """One line per method (colour) and batch size (dashes); the diagonal is all that FLOPs promise.

    Raises:
        ImportError: matplotlib is missing.
    """
    figure_class, _ = matplotlib_parts()
    figure = figure_class(figsize=(6.4, 5.2), layout="constrained")
    axes = figure.subplots()
    pruned = [row for row in rows if row["kind"] == "pruned"]
    names = list(dict.fromkeys(row["variant"] for row in pruned))
    batches = list(dict.fromkeys(row["batch"] for row in pruned))
    for colour, name in enumerate(names):
        for dash, batch in enumerate(batches):
            own = [row for row in pruned if (row["variant"], row["batch"]) == (name, batch)]
            own.sort(key=lambda row: row["ideal_speedup"])
            measured = [row["speedup"]["prefill"] for row in own]
            middle = [speed["median"] for speed in measured]
            axes.errorbar(
                [row["ideal_speedup"] for row in own],
                middle,
                [
                    [speed["median"] - speed["q1"] for speed in measured],
                    [speed["q3"] - speed["median"] for speed in measured],
                ],
                color=COLOURS[colour % len(COLOURS)],
                linestyle=_DASHES[dash % len(_DASHES)],
                marker="o",
                markersize=4,
                capsize=3,
                label=f"{name}, batch {batch}",
            )
    most = max((row["ideal_speedup"] for row in pruned), default=1.0)
    axes.plot([1, most], [1, most], color="#868e96", linewidth=1, label="as FLOPs promise")
    axes.set_xlabel("speed-up of the prefill by FLOPs")
    axes.set_ylabel("speed-up of the prefill, measured")
    axes.set_title(title, fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#e9ecef")
    axes.legend(frameon=False)
    return figure
