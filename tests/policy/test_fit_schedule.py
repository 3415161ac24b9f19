"""Schedules of fixed shape: the costliest that the budget pays for, and never more than was asked."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from autoprune import Budget, create
from autoprune.methods import METHODS
from autoprune.methods.base import Planned
from autoprune.policy.budget import InfeasibleBudget
from autoprune.policy.cost import DecoderCost
from autoprune.policy.schedules import fit_schedule
from tests.policy.examples import examples

PLANNED = [name for name, cls in METHODS.items() if issubclass(cls, Planned)]
PRICED = ("flops", "kv_bytes")


def one_cut(setting, layers=3, visual=10):
    """All tokens in layer 0, `setting` of them in every other."""
    return [visual, *[setting] * (layers - 1)]


# Two layers behind a full one, N = 10: a setting s costs 10 + 2 s.
@pytest.mark.parametrize(
    ("mean", "asked", "kept"),
    [
        (5.5, 16, 3),  # 16.5: halves go to the even number
        (5.7, 17, 3),  # 17.1
        (5.83, 17, 3),  # 17.49
        (5.9, 18, 4),  # 17.7
        (6, 18, 4),
        (6.16, 18, 4),  # 18.48
        (6.5, 20, 5),  # 19.5: to the even number again
        (1000, 30, 10),
    ],
)
def test_tokens_are_rounded_once_and_spent_from_below(mean, asked, kept):
    plan = fit_schedule(one_cut, range(1, 11), 10, Budget.tokens(mean))
    assert plan == [10, kept, kept]
    assert sum(plan) <= asked < sum(one_cut(kept + 1)) or kept == 10


def test_what_leaves_the_last_layer_counts_once_more():
    # n_1 + n_2 + n_2 = 3 s, against round(3 x 4.4) = 13.
    budget = Budget.tokens(4.4, counted="leaving")
    assert fit_schedule(one_cut, range(1, 11), 10, budget) == [10, 4, 4]


def test_a_ratio_is_rounded_over_all_layers():
    # 3 x .57 x 10 = 17.1 and 3 x .6 x 10 = 18.
    assert fit_schedule(one_cut, range(1, 11), 10, Budget.ratio(0.57)) == [10, 3, 3]
    assert fit_schedule(one_cut, range(1, 11), 10, Budget.ratio(0.6)) == [10, 4, 4]


def test_bytes_and_flops_are_rounded_down():
    cost = DecoderCost(3, 8, 2, 1, 4, 16)
    per_token = cost.kv_bytes_per_token
    for missing, kept in ((0, 4), (1, 3)):
        budget = Budget.kv_bytes((10 + 2 * 4) * per_token - missing)
        assert fit_schedule(one_cut, range(1, 11), 10, budget, cost) == [10, kept, kept]
    full = cost.prefill_flops([10] * 3)
    share = cost.prefill_flops([10, 4, 4]) / full
    for less, kept in ((-1e-9, 4), (1e-9, 3)):
        plan = fit_schedule(one_cut, range(1, 11), 10, Budget.flops(share - less), cost)
        assert plan == [10, kept, kept]


@st.composite
def asked(draw):
    """A method, the size of a prompt and a budget of any kind."""
    layers, visual = draw(st.integers(2, 40)), draw(st.integers(1, 700))
    text = draw(st.integers(0, 60))
    cost = DecoderCost(layers, 64, 4, draw(st.sampled_from([1, 4])), 16, 128)
    share = draw(st.floats(0.02, 1))
    full_bytes = cost.kv_bytes([visual] * layers, text)
    budget = draw(
        st.sampled_from(
            [
                # Quarters of a token are exact in binary, and so is the rounding.
                Budget.tokens(max(1, round(4 * share * visual)) / 4),
                Budget.tokens(max(1, round(4 * share * visual)) / 4, counted="leaving"),
                Budget.ratio(max(1, round(64 * share)) / 64),
                Budget.flops(share),
                Budget.kv_bytes(max(1, int(share * full_bytes))),
            ]
        )
    )
    return create(draw(st.sampled_from(PLANNED)), budget), layers, visual, text, cost


def spent_and_allowed(plan, budget, visual, text, cost):
    """In the budget's own unit, from its definition in docs/budget.md."""
    layers = len(plan)
    if budget.kind == "kv_bytes":
        return (sum(plan) + layers * text) * cost.kv_bytes_per_token, budget.value
    if budget.kind == "flops":
        full = sum(cost.layer_flops(visual + text) for _ in plan)
        return sum(cost.layer_flops(n + text) for n in plan), budget.value * full
    left = [*plan[1:], plan[-1]] if budget.counted == "leaving" else plan
    mean = Fraction(budget.value) * (visual if budget.kind == "ratio" else 1)
    return sum(left), round(layers * mean)


@examples(200)
@given(asked())
def test_no_method_of_fixed_shape_exceeds_its_budget_and_no_costlier_setting_fits(setting):
    method, layers, visual, text, cost = setting
    budget = method.budget
    try:
        plan = method.plan(layers, visual, text, cost)
    except InfeasibleBudget as refusal:
        smallest = refusal.smallest
    else:
        smallest = None
    if smallest is not None:
        cheapest = create(method.name, smallest).plan(layers, visual, text, cost)
        spent, allowed = spent_and_allowed(cheapest, budget, visual, text, cost)
        assert spent > allowed
        return
    spent, allowed = spent_and_allowed(plan, budget, visual, text, cost)
    assert spent <= allowed
    if method.name == "pdrop":  # chooses between two families
        return
    costlier = [
        shape
        for shape in (method.shape(s, visual, layers) for s in method.settings(visual, layers))
        if sum(shape) > sum(plan)
    ]
    if costlier:
        least = min(costlier, key=sum)
        spent, allowed = spent_and_allowed(least, budget, visual, text, cost)
        assert spent > allowed


@pytest.mark.parametrize("budget", [64, 63.99, 100.5])
def test_a_flat_schedule_is_in_whole_tokens(budget):
    # 32 x 63.99 rounds to 2048, which 64 in each layer costs.
    plan = create("random", budget).plan(32, 576)
    assert set(plan) == {64 if budget < 100 else 100}


SIZES = {
    "num_layers": (0, -1, 32.5, "32", True, None, math.nan),
    "num_visual": (-1, 0.5, "576", False, None, math.inf),
    "num_text": (-1, 1.5, "12", None),
}


@pytest.mark.parametrize("name", ["autoprune", *PLANNED])
@pytest.mark.parametrize("size", SIZES)
def test_a_size_that_is_none_is_refused_and_named(name, size):
    more = {"mutual_information": 0.5} if name == "autoprune" else {}
    method = create(name, 400)
    for value in SIZES[size]:
        given = {"num_layers": 32, "num_visual": 576, "num_text": 0, size: value}
        with pytest.raises(ValueError, match=f"^{size} must be a whole number, . or more, got"):
            method.plan(**given, **more)


@pytest.mark.parametrize("bits", [-1, -1e-9, math.nan, math.inf, "0.5", None, True])
def test_information_that_is_none_is_refused(bits):
    with pytest.raises(ValueError, match=r"^mutual_information must be a number of bits, finite"):
        create("autoprune", 64).plan(32, 576, bits)


@pytest.mark.parametrize("name", ["autoprune", *PLANNED])
def test_numbers_of_numpy_are_sizes(name):
    more = (0.5,) if name == "autoprune" else ()
    method = create(name, 400)
    given = (np.float32(x) for x in more)
    assert method.plan(np.int64(32), np.int32(576), *given) == method.plan(32, 576, *more)
