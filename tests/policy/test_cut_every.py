"""A staircase instead of a curve: few cuts, the same budget to the token, the same shape."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from autoprune import AutoPrune, Budget
from autoprune.policy.budget import InfeasibleBudget
from autoprune.policy.cost import DecoderCost
from tests.policy.examples import examples

LLAVA_7B = DecoderCost(32, 4096, 32, 32, 128, 11008)


def cuts(plan):
    """The layers that fewer tokens enter than the one before."""
    return [layer for layer in range(1, len(plan)) if plan[layer] < plan[layer - 1]]


def alone(method):
    """Layers that share no cut: up to the first one behind the measurement, and the first two."""
    return 2 if method.mi_layer == "peek" else method.mi_layer + 2


def steps(method, layers):
    """Where a cut is meant to be."""
    return {*range(alone(method)), *range(alone(method), layers, method.cut_every)}


@st.composite
def settings(draw):
    layers = draw(st.integers(2, 40))
    visual = draw(st.integers(1, 3000))
    budget = draw(
        st.one_of(
            st.floats(0.02, 1).map(lambda share: Budget.tokens(share * visual)),
            st.floats(0.02, 1).map(Budget.ratio),
        )
    )
    first_cut = draw(st.sampled_from(["after_layer_0", "pre_llm", "peek"]))
    measured = st.integers(0, min(layers - 2, 3))
    method = AutoPrune(
        budget,
        k0=draw(st.floats(0, 2)),
        beta=draw(st.floats(-3, 3)),
        curve=draw(st.sampled_from(["logistic", "linear", "step"])),
        mi_layer=draw(measured | st.just("peek") if first_cut == "peek" else measured),
        first_cut=first_cut,
        cut_every=draw(st.integers(1, 12)),
    )
    return method, layers, visual, draw(st.floats(0, 2))


@examples(200)
@given(settings())
def test_the_budget_is_spent_exactly_and_at_most_one_token_falls_between_steps(setting):
    method, layers, visual, bits = setting
    try:
        plan = method.plan(layers, visual, bits)
    except InfeasibleBudget:
        assume(False)
    asked = method.budget.value * (visual if method.budget.kind == "ratio" else 1)
    assert sum(plan) == min(round(layers * asked), layers * visual)
    assert plan == sorted(plan, reverse=True)
    assert plan[0] <= visual
    assert plan[-1] >= 1
    between = [layer for layer in cuts(plan) if layer not in steps(method, layers)]
    assert len(between) <= 1
    for layer in between:
        assert plan[layer - 1] - plan[layer] == 1
        # Had it fitted, it would be in the layer before the staircase.
        first = alone(method) - 1
        assert plan[first - 1] - plan[first] < method.cut_every


@pytest.mark.parametrize("bits", [0.0, 0.3, 0.8])
def test_a_step_is_as_high_as_the_curve_is_on_average(bits):
    smooth, stairs = (AutoPrune(64, cut_every=k).plan(32, 576, bits) for k in (1, 4))
    assert smooth[:2] == stairs[:2]
    for start in range(3, 32, 4):
        mean = np.mean(smooth[start : start + 4])
        assert stairs[start] == pytest.approx(mean, abs=2 + 0.02 * mean)


def test_eight_prompts_of_a_batch_share_their_cuts():
    plans = [AutoPrune(320, cut_every=4).plan(32, 2880, bits) for bits in np.linspace(0.1, 1, 8)]
    assert {layer for plan in plans for layer in cuts(plan)} == {1, 2, *range(3, 32, 4)}


def test_every_layer_is_the_default():
    assert AutoPrune(64) == AutoPrune(64, cut_every=1)
    assert len(cuts(AutoPrune(64).plan(32, 576, 0.8))) == 31


@pytest.mark.parametrize("budget", [Budget.flops(0.3), Budget.tokens(100, counted="leaving")])
def test_other_budgets_keep_their_promises(budget):
    method = AutoPrune(budget, cut_every=4)
    plan = method.plan(32, 576, 0.5, num_text=40, cost=LLAVA_7B)
    assert plan == sorted(plan, reverse=True)
    if budget.kind == "flops":
        allowed = 0.3 * LLAVA_7B.prefill_flops([576] * 32, 40)
        spent = LLAVA_7B.prefill_flops(plan, 40)
        assert allowed - LLAVA_7B.layer_flops(40 + 576) + LLAVA_7B.layer_flops(40 + 575) < spent
        assert spent <= allowed
    else:
        assert sum(plan[1:]) + plan[-1] == 32 * 100
    smooth = replace(method, cut_every=1).plan(32, 576, 0.5, num_text=40, cost=LLAVA_7B)
    assert len(cuts(plan)) < len(cuts(smooth)) / 2


def test_kv_budgets_level_their_steps():
    budget = Budget.kv_bytes(32 * 200 * LLAVA_7B.kv_bytes_per_token)
    plan = AutoPrune(budget, cut_every=4).plan(32, 576, 0.5, num_text=40, cost=LLAVA_7B)
    assert sum(plan) == 32 * (200 - 40)
    assert set(cuts(plan)) <= {1, 2, *range(3, 32, 4)}
