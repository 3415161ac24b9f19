"""The plot of a comparison names every line where it ends, and no name lies on another."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autoprune.evaluation.plot import _LINE, highlighted, plot, spread


def row(method, budget, flops, accuracy, low=None, high=None, over=False):
    return {
        "method": method,
        "budget": budget,
        "status": "ok",
        "tokens_asked": 10,
        "tokens_entering": 12 if over else 10,
        "flops_share": flops,
        "accuracy": accuracy,
        "accuracy_low": low,
        "accuracy_high": high,
    }


FULL = row("full", "1", 1.0, 0.95)
MANY = [FULL] + [
    row(f"method_{index}", budget, flops + 0.001 * (index % 3), 0.9 - 0.01 * index - loss, 0.1, 1)
    for index in range(24)
    for budget, flops, loss in (("1/2", 0.5, 0), ("1/9", 0.15, 0.3))
]


def words(figure):
    """The names that are drawn, and the boxes that they take."""
    figure.canvas.draw()
    renderer = figure.canvas.get_renderer()
    # A thread belongs to its name's box, the text alone does not.
    return {
        text.get_text(): super(type(text), text).get_window_extent(renderer)
        for text in figure.axes[0].texts
    }


@pytest.mark.parametrize("methods", [1, 2, 5, 8, 24])
@pytest.mark.parametrize("budgets", [("1/2", "1/9"), ("1/9",)])
def test_every_line_has_its_name_within_the_picture_and_apart_from_others(methods, budgets):
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    names = [f"method_{index}" for index in range(methods)]
    rows = [FULL, *(r for r in MANY if r["method"] in names and r["budget"] in budgets)]
    figure = plot(rows, "method_0")
    FigureCanvasAgg(figure)
    boxes = words(figure)
    assert set(boxes) == {*names, "full: nothing pruned"}
    ordered = sorted((boxes[name] for name in names), key=lambda box: box.y0)
    for below, above in pairwise(ordered):
        assert below.y1 <= above.y0 + 2 or below.x1 < above.x0 or above.x1 < below.x0
    for box in boxes.values():
        assert box.x0 >= 0
        assert box.x1 <= figure.bbox.width
        assert box.y0 >= 0
        assert box.y1 <= figure.bbox.height


def test_few_methods_are_all_in_colour_the_baseline_first():
    rows = [FULL, row("a", "1/2", 0.5, 0.7), row("b", "1/2", 0.5, 0.9), row("c", "1/2", 0.5, 0.8)]
    assert highlighted(rows, "c") == ["c", "a", "b"]
    assert highlighted(rows, "absent") == ["a", "b", "c"]


def test_of_many_methods_those_that_win_and_the_baseline_are_in_colour():
    others = [row(f"m{i}", budget, 0.3, 0.5) for i in range(8) for budget in ("1/2", "1/9")]
    rows = [
        FULL,
        *others,
        row("half", "1/2", 0.5, 0.9),
        row("ninth", "1/9", 0.1, 0.8),
        # It is better there, and spent more than was asked.
        row("spender", "1/9", 0.4, 0.95, over=True),
    ]
    assert highlighted(rows, "m3") == ["m3", "half", "ninth"]


def test_only_what_is_in_colour_has_intervals():
    figure = plot(MANY, "method_5")
    axes = figure.axes[0]
    drawn = {bars.lines[0].get_color() for bars in axes.containers}
    # The baseline, and the one that is best at both budgets.
    assert len(drawn) == len(axes.containers) == 2
    assert [line.get_color() for line in axes.lines].count(_LINE) == 22


@given(
    st.lists(st.floats(0, 1), min_size=1, max_size=30).map(sorted),
    st.floats(0.001, 0.03),
)
def test_names_keep_their_order_and_distance(places, gap):
    found = spread(places, gap, 1)
    assert all(b - a >= gap - 1e-9 for a, b in pairwise(found))
    assert max(found) <= 1 + 1e-9
    if all(b - a >= gap for a, b in pairwise(places)):
        assert found == pytest.approx(places)


def test_names_that_would_overlap_share_the_distance():
    # Two at one place move half a gap each; three end around their mean.
    assert spread([0.5, 0.5], 0.1, 1) == pytest.approx([0.45, 0.55])
    assert spread([0.4, 0.5, 0.51], 0.1, 1) == pytest.approx([0.37, 0.47, 0.57])
    assert spread([0.99, 1.0], 0.1, 1) == pytest.approx([0.9, 1.0])
