"""The plot of a comparison: accuracy over compute, one line for each method."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..viz import matplotlib_parts
from .results import Row, overspends
from .settings import FULL

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette, which colour-blind readers can tell apart, without its pale yellow.
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000")
_LINE, _THREAD, _NAME = "#b6bec6", "#dee2e6", "#5c636a"
_LONGEST = 48  # letters of a name
# Inches: the axes, what a letter of a name takes, and the room around.
_WIDTH, _LETTER, _LEFT, _RIGHT, _TOP, _BOTTOM = 6.4, 0.078, 0.75, 0.45, 0.2, 0.6
_GAP = 10.5  # points between the middles of two names
_FAR = 0.15  # share of the width between ends of lines whose names are in columns of their own


def plot(rows: Sequence[Row], baseline: str) -> Figure:
    """Accuracy over the share of decoder prefill FLOPs, each line named at its end.

    In colour, with intervals: the baseline, and the methods that are best at a budget; all methods, if there
    are few. The others are grey.

    Args:
        rows: of `results`, the unpruned model first.

    Raises:
        ImportError: matplotlib is missing.
    """
    figure_class, formatter = matplotlib_parts()
    ran = [row for row in rows if row["status"] == "ok" and row["method"] != FULL]
    lines: dict[str, list[Row]] = {}
    for row in sorted(ran, key=lambda row: row["flops_share"]):
        lines.setdefault(row["method"], []).append(row)
    width = _LEFT + _WIDTH + _RIGHT + _LETTER * max(map(len, map(_name, lines)), default=0)
    height = max(4.8, _TOP + _BOTTOM + (len(lines) + 3) * _GAP / 72)
    figure = figure_class(figsize=(width, height))
    figure.subplots_adjust(
        left=_LEFT / width,
        right=(_LEFT + _WIDTH) / width,
        top=1 - _TOP / height,
        bottom=_BOTTOM / height,
    )
    axes = figure.subplots()
    coloured = dict(zip(highlighted(rows, baseline), _COLOURS, strict=False))
    for label in sorted(lines, key=lambda label: label in coloured):
        _draw(axes, lines[label], coloured.get(label))
    axes.axhline(rows[0]["accuracy"], color="#495057", linewidth=1, linestyle="--")
    axes.xaxis.set_major_formatter(formatter(lambda value, _: f"{100 * value:g}%"))
    axes.set_xlabel("decoder prefill FLOPs, share of the unpruned model's")
    axes.set_ylabel("accuracy, mean over kinds")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#f1f3f5")
    axes.set_axisbelow(True)
    _name_lines(axes, lines, coloured, _GAP / 72 / (height - _TOP - _BOTTOM))
    _name_unpruned(axes, rows[0])
    return figure


def highlighted(rows: Sequence[Row], baseline: str) -> list[str]:
    """The methods in colour, the baseline first: all of them, or else those that are best at a budget.

    What spends more than its budget is not best at it.
    """
    ran = [row for row in rows if row["status"] == "ok" and row["method"] != FULL]
    names = list(dict.fromkeys(row["method"] for row in ran))
    first = [baseline] if baseline in names else []
    if len(names) <= len(_COLOURS):
        return list(dict.fromkeys([*first, *names]))
    best: dict[str, Row] = {}
    for row in ran:
        known = best.get(row["budget"])
        if not overspends(row) and (known is None or row["accuracy"] > known["accuracy"]):
            best[row["budget"]] = row
    winners = [row["method"] for row in best.values()]
    return list(dict.fromkeys([*first, *winners]))[: len(_COLOURS)]


def spread(places: Sequence[float], gap: float, top: float) -> list[float]:
    """Places that are at least `gap` apart and near the given ones, in the same order.

    Args:
        places: ascending.
        top: none lies above it, as long as there is room below.
    """
    # Names that would overlap are joined to a block, in the middle of what they would like.
    blocks: list[tuple[float, int]] = []
    for place in places:
        middle, count = place, 1
        while blocks:
            before, size = blocks[-1]
            if middle - before >= gap * (size + count) / 2:
                break
            blocks.pop()
            middle, count = (before * size + middle * count) / (size + count), size + count
        blocks.append((middle, count))
    found = [
        middle + gap * (index - (count - 1) / 2)
        for middle, count in blocks
        for index in range(count)
    ]
    limits = [top - gap * index for index in range(len(found))][::-1]
    return [min(place, limit) for place, limit in zip(found, limits, strict=True)]


def _draw(axes: Axes, own: Sequence[Row], colour: str | None) -> None:
    x, y = [row["flops_share"] for row in own], [row["accuracy"] for row in own]
    if colour is None:
        axes.plot(x, y, color=_LINE, linewidth=1, marker="o", markersize=2.5)
        return
    bounds = [
        (0.0, 0.0)
        if row["accuracy_low"] is None
        else (row["accuracy"] - row["accuracy_low"], row["accuracy_high"] - row["accuracy"])
        for row in own
    ]
    errors = [[max(0.0, one) for one in side] for side in zip(*bounds, strict=True)]
    style: dict[str, Any] = {"markersize": 5, "linewidth": 1.8, "elinewidth": 0.9, "capsize": 2}
    axes.errorbar(x, y, errors, color=colour, marker="o", zorder=3, **style)


def _name_lines(
    axes: Axes, lines: dict[str, list[Row]], coloured: dict[str, str], gap: float
) -> None:
    """Write names in columns, each with a thread to the end of its line.

    Lines that end at similar places share a column behind the last of them.

    Args:
        gap: between two names, as a share of the height.
    """
    (left, right), (low, high) = axes.get_xlim(), axes.get_ylim()
    axes.set_xlim(left, right)
    axes.set_ylim(low, high)
    ends = {
        label: (
            (own[-1]["flops_share"] - left) / (right - left),
            (own[-1]["accuracy"] - low) / (high - low),
        )
        for label, own in lines.items()
    }
    for names in _columns(ends):
        last = max(ends[label][0] for label in names)
        column = 1.02 if last > 1 - _FAR else last + 0.02
        names.sort(key=lambda label: ends[label][1])
        heights = spread([ends[label][1] for label in names], gap, 1)
        for label, height in zip(names, heights, strict=True):
            _write(axes, label, ends[label], (column, height), coloured.get(label))


def _columns(ends: dict[str, tuple[float, float]]) -> list[list[str]]:
    """The labels, parted where the next line ends far to the right of the one before."""
    found: list[list[str]] = []
    before = 0.0
    for label in sorted(ends, key=lambda label: ends[label][0]):
        x = ends[label][0]
        if not found or x - before > _FAR:
            found.append([])
        found[-1].append(label)
        before = x
    return found


def _write(
    axes: Axes,
    label: str,
    end: tuple[float, float],
    place: tuple[float, float],
    colour: str | None,
) -> None:
    """One name; places are shares of the axes."""
    thread = {"arrowstyle": "-", "color": colour or _THREAD, "linewidth": 0.7}
    axes.annotate(
        _name(label),
        end,
        place,
        xycoords="axes fraction",
        textcoords="axes fraction",
        arrowprops={**thread, "relpos": (0, 0.5), "shrinkA": 0, "shrinkB": 3},
        # A name within the axes lies on lines.
        bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.3},
        color=colour or _NAME,
        fontsize=9 if colour else 7.5,
        fontweight="bold" if colour else "normal",
        va="center",
        annotation_clip=False,
        zorder=5 if colour else 4,
    )


def _name_unpruned(axes: Axes, full: Row) -> None:
    axes.annotate(
        f"{FULL}: nothing pruned",
        (0.01, full["accuracy"]),
        (0, 3),
        xycoords=axes.get_yaxis_transform(),
        textcoords="offset points",
        color="#495057",
        fontsize=8,
        annotation_clip=False,
    )


def _name(label: str) -> str:
    return label if len(label) <= _LONGEST else label[: _LONGEST - 3] + "..."
