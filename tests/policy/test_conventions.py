"""What papers call 64 tokens, and what really enters their layers."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autoprune import AutoPrune, Budget, create
from autoprune.policy.conventions import (
    CONVENTIONS,
    entering_from_leaving,
    entering_to_leaving,
    from_entering,
    published_schedule,
    readings,
    to_entering,
)
from autoprune.policy.released import (
    first_cut_count,
    released_keep_fractions,
    released_runtime_counts,
)
from tests.policy.examples import examples

FIXED = [name for name in CONVENTIONS if name != "leaving"]


@pytest.mark.parametrize(
    ("convention", "stated", "entering"),
    [
        # (2 x 576 + 30 n) / 32
        ("fastv", 64, 96),
        ("fastv", 128, 156),
        ("fastv", 192, 216),
        # FastV's own rate of one half: 288 of 576 after layer 2.
        ("fastv", 288, 306),
        # lambda 1/2: 576, 288, 144 and 72 in eight layers each.
        ("pdrop", 270, 270),
        # Kept + merged of 576: 300 + 9, 200 + 4, 110 + 3; entering 3, 4, 9 and 16 layers.
        ("sparsevlm", 192, (3 * 576 + 4 * 309 + 9 * 204 + 16 * 113) / 32),
        # 303 + 9, 110 + 7, 36 + 3
        ("sparsevlm", 128, (3 * 576 + 4 * 312 + 9 * 117 + 16 * 39) / 32),
        # 66 + 16, 30 + 2, 17 + 1
        ("sparsevlm", 64, (3 * 576 + 4 * 82 + 9 * 32 + 16 * 18) / 32),
        ("visionzip", 64, 64),
        ("entering", 64, 64),
    ],
)
def test_published_settings_of_llava_worked_out_by_hand(convention, stated, entering):
    assert to_entering(convention, stated) == pytest.approx(entering, abs=1e-9)
    assert from_entering(convention, entering) == pytest.approx(stated, abs=1e-6)


def test_sparsevlm_states_the_mean_of_what_leaves():
    for stated, leaving in ((192, 192.03), (128, 128.63), (64, 64.81)):
        found = readings(published_schedule("sparsevlm", stated))
        assert found.leaving == pytest.approx(leaving, abs=0.01)
    prices = [to_entering("sparsevlm", stated) for stated in (192, 128, 64)]
    assert prices == pytest.approx([206.5, 145.40625, 82.25], abs=1e-9)


def test_the_five_readings_of_one_schedule():
    # Two layers of 100, one of 40, one of 10.
    found = readings([100, 100, 40, 10])
    assert found.entering == 250 / 4
    assert found.leaving == (100 + 40 + 10 + 10) / 4
    assert found.after_last_cut == 10
    assert found.first_layer == 100
    assert found.mean_of_stages == 50


def test_fastv_s_64_is_five_numbers():
    found = readings(published_schedule("fastv", 64))
    assert (found.after_last_cut, found.entering, found.leaving) == (64, 96, 80)
    assert (found.first_layer, found.mean_of_stages) == (576, 320)


def test_entering_and_leaving_of_what_is_planned():
    plan = AutoPrune(Budget.tokens(64, counted="leaving")).plan(32, 576, 0.5)
    entering = entering_from_leaving(64, plan[-1], 576, 32)
    assert entering == sum(plan) / 32
    assert entering_to_leaving(entering, plan[-1], 576, 32) == 64
    assert readings(plan).leaving == 64


def test_the_library_s_methods_spend_what_the_convention_says():
    # n = (32 B - 2 N) / 30, as FastV's method has it.
    plan = create("fastv", to_entering("fastv", 64)).plan(32, 576)
    assert plan == published_schedule("fastv", 64)
    plan = create("pdrop", 270).plan(32, 576)
    assert plan == pytest.approx(published_schedule("pdrop", 270))


@examples(200)
@given(st.sampled_from(FIXED), st.integers(1, 3000), st.integers(3, 80), st.floats(0.001, 1))
def test_there_and_back(convention, visual, layers, share):
    if convention == "pdrop":
        share = 0.25 + 0.75 * share
    stated = share * visual
    schedule = published_schedule(convention, stated, visual, layers)
    assert len(schedule) == layers
    assert all(a >= b - 1e-9 for a, b in pairwise(schedule))
    assert 0 <= schedule[-1] <= schedule[0] <= visual
    entering = to_entering(convention, stated, visual, layers)
    assert stated <= entering * (1 + 1e-9) or convention in ("pdrop", "sparsevlm")
    assert from_entering(convention, entering, visual, layers) == pytest.approx(stated, rel=1e-6)


def test_stages_of_unequal_length_cost_more_or_less_than_their_mean():
    # 10 layers: cuts before 2, 5 and 7, so that the stages have 2, 3, 2 and 3 layers.
    assert to_entering("pdrop", 270, 576, 10) == (2 * 576 + 3 * 288 + 2 * 144 + 3 * 72) / 10


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: to_entering("dart", 64), "unknown convention 'dart'; choose one of: fastv, pdrop"),
        (lambda: to_entering("leaving", 64), "counted='leaving'"),
        (lambda: to_entering("pdrop", 128), "a quarter of which is 144"),
        (lambda: from_entering("fastv", 30), "cost 36 alone"),
        (lambda: to_entering("fastv", 600), "at most the prompt's 576, got 600"),
        (lambda: to_entering("fastv", 0), "above 0"),
        (lambda: to_entering("fastv", math.nan), "above 0"),
        (lambda: to_entering("fastv", "64"), "above 0"),
        (lambda: to_entering("fastv", 64, 576, 0), "num_layers must be a whole number"),
    ],
)
def test_what_cannot_be_converted_says_why(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def released(target):
    """Entering mean of the released AutoPrune at a slope of 0.2."""
    first = first_cut_count(target, 576)
    plan = released_keep_fractions(32, 576, target, first, 14.9, 0.2)
    counts = released_runtime_counts(first, plan.fractions, 576)
    return sum(counts.entering(576)) / 32


def test_the_table_of_published_numbers_is_what_is_computed():
    page = (Path(__file__).parents[2] / "docs" / "budget.md").read_text(encoding="utf-8")
    stated = (192, 128, 64)
    rows = {
        "FastV": [to_entering("fastv", number) for number in stated],
        "PyramidDrop": [to_entering("pdrop", 192), None, None],
        "SparseVLM": [to_entering("sparsevlm", number) for number in stated],
        "AutoPrune, released": [released(number) for number in stated],
        "VisionZip": [to_entering("visionzip", number) for number in stated],
        "this library": [to_entering("entering", number) for number in stated],
    }
    for name, prices in rows.items():
        (line,) = (line for line in page.splitlines() if line.startswith(f"| {name}"))
        cells = [cell.strip() for cell in line.strip("|").split("|")[2:]]
        assert cells == [
            "-" if price is None else f"{price + 1e-9:.1f}".removesuffix(".0") for price in prices
        ]
    for number in (128, 64):
        with pytest.raises(ValueError, match="a quarter of which is 144"):
            to_entering("pdrop", number)
