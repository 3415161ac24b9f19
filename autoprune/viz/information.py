"""The mutual information of each kind of question."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from .style import COLOURS, new_figure, style_axes, theme

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_COLUMN = "mutual_information_"


def information_of_kinds(results: Mapping[str, Any], method: str | None = None) -> dict[str, float]:
    """Mean mutual information in bits of each kind of question, in the order of the results.

    Args:
        results: what `results.json` of a comparison holds.
        method: the label of a row; default: the first that measured any.

    Raises:
        ValueError: no such method, or none measured information.
    """
    rows = [row for row in results["rows"] if method in (None, row["method"])]
    if not rows:
        labels = dict.fromkeys(row["method"] for row in results["rows"])
        raise ValueError(
            f"there is no method {method!r} in the results; they have {', '.join(labels)}"
        )
    for row in rows:
        found = {
            name.removeprefix(_COLUMN): value
            for name, value in row.items()
            if name.startswith(_COLUMN) and value is not None
        }
        if found:
            return found
    raise ValueError(
        "no method of these results measured mutual information; compare autoprune among them"
    )


def information_by_kind(
    results: Mapping[str, Any], method: str | None = None, dark: bool = False
) -> Figure:
    """Mean mutual information of each kind of question, the hardest (the least) first.

    Args:
        results, method: as for `information_of_kinds`.
        dark: light text on dark paper.

    Raises:
        ImportError: matplotlib is missing.
        ValueError: no such method, or none measured information.
    """
    found = sorted(information_of_kinds(results, method).items(), key=lambda pair: pair[1])
    figure = new_figure(6.4, 0.9 + 0.32 * len(found), dark)
    axes = figure.subplots()
    names = [name.replace("$", r"\$") for name, _ in found]
    bars = axes.barh(range(len(found)), [bits for _, bits in found], color=COLOURS[0], height=0.7)
    axes.set_yticks(range(len(found)), names)
    axes.invert_yaxis()
    axes.bar_label(bars, fmt="%.3f", padding=3, color=theme(dark).ink, fontsize=9)
    axes.margins(x=0.12)
    axes.set_xlabel("mean mutual information, bits (little: hard, much: easy)")
    style_axes(axes, dark, grid="x")
    return figure
