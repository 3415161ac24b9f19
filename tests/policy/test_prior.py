"""The layers before the information is known: a straight line instead of the curve, the same budget."""

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


def linear(budget, mi_layer, **options):
    return AutoPrune(budget, prior="linear", mi_layer=mi_layer, **options)


@pytest.mark.parametrize("bits", [0.0, 0.3, 2.0])
def test_the_line_worked_out_by_hand(bits):
    # 4 layers of 100 tokens at a mean of 40: what layer 0 leaves of 160 lies at 3 : 2 : 1.
    assert linear(40, 2).plan(4, 100, bits) == [100, 30, 20, 10]
    plan = linear(40, 1).plan(4, 100, bits)
    assert plan[:2] == [100, 30]
    assert sum(plan) == 160
    # Cut before the decoder, all 100 of a mean of 25 lie at 4 : 3 : 2 : 1.
    assert linear(25, 2, first_cut="pre_llm").plan(4, 100, bits) == [40, 30, 20, 10]


def test_it_falls_by_the_same_number_in_every_layer_before_the_measurement():
    # 32 x 64 - 576 = 1472 over 31 + 30 + ... + 1 = 496: 2.97 tokens a layer.
    plan = linear(64, 10).plan(32, 576, 0.5)
    expected = [1472 / 496 * (32 - layer) for layer in range(1, 11)]
    assert plan[1:11] == pytest.approx(expected, abs=1)
    # The curve is nearly level there.
    level = AutoPrune(64, mi_layer=10).plan(32, 576, 0.5)
    assert level[1] - level[10] < 15 < plan[1] - plan[10]


def test_the_curve_is_the_default_and_both_agree_where_nothing_comes_before():
    assert AutoPrune(64) == AutoPrune(64, prior="curve")
    assert AutoPrune(64) != AutoPrune(64, prior="linear")
    # Measured in layer 0, only the full layer 0 is decided before.
    same = [
        AutoPrune(64, mi_layer=0, prior=prior).plan(32, 576, 0.4) for prior in ("curve", "linear")
    ]
    assert same[0] == same[1]


@st.composite
def settings(draw):
    layers, visual = draw(st.integers(2, 40)), draw(st.integers(1, 3000))
    share = draw(st.floats(0.02, 1))
    kind = draw(st.sampled_from(["tokens", "leaving", "ratio", "flops", "kv_bytes"]))
    cost = DecoderCost(layers, 64, 4, 2, 16, 128)
    if kind == "kv_bytes":
        budget = Budget.kv_bytes(max(1, int(share * cost.kv_bytes([visual] * layers, 20))))
    elif kind in ("ratio", "flops"):
        budget = Budget(kind, share)
    else:
        counted = "leaving" if kind == "leaving" else "entering"
        budget = Budget.tokens(share * visual, counted=counted)
    method = linear(
        budget,
        draw(st.integers(0, min(layers - 2, 6))),
        k0=draw(st.floats(0, 2)),
        curve=draw(st.sampled_from(["logistic", "linear", "step", "exponential"])),
        first_cut=draw(st.sampled_from(["after_layer_0", "pre_llm", "peek"])),
        cut_every=draw(st.sampled_from([1, 3])),
    )
    return method, layers, visual, cost, draw(st.floats(0, 3))


@examples(200)
@given(settings())
def test_the_budget_stays_exact_and_what_comes_before_knows_nothing_of_the_information(setting):
    method, layers, visual, cost, bits = setting
    size = {"num_layers": layers, "num_visual": visual, "num_text": 20, "cost": cost}
    try:
        plan = method.plan(**size, mutual_information=bits)
    except InfeasibleBudget:
        assume(False)
    budget, decided = method.budget, method.mi_layer + 1
    assert plan == sorted(plan, reverse=True)
    assert 1 <= plan[-1] <= plan[0] <= visual
    assert plan[:decided] == method.plan(**size, mutual_information=0.0)[:decided]
    assert (
        plan[:decided]
        == replace(method, k0=0.7, x0=3.0).plan(**size, mutual_information=1.0)[:decided]
    )
    if budget.kind in ("flops", "kv_bytes"):
        spend = cost.prefill_flops if budget.kind == "flops" else cost.kv_bytes
        full = spend([visual] * layers, 20)
        allowed = budget.value * full if budget.kind == "flops" else budget.value
        assert spend(plan, 20) <= allowed
        of_layer = (
            cost.layer_flops if budget.kind == "flops" else (lambda n: n * cost.kv_bytes_per_token)
        )
        price = of_layer(20 + visual) - of_layer(20 + visual - 1)
        assert spend(plan, 20) > min(allowed, full) - price
    else:
        left = [*plan[1:], plan[-1]] if budget.counted == "leaving" else plan
        asked = budget.value * (visual if budget.kind == "ratio" else 1)
        assert sum(left) == min(round(layers * asked), layers * visual)


@examples(150)
@given(settings())
def test_a_cache_has_room_for_what_the_line_leaves(setting):
    method, layers, visual, cost, bits = setting
    try:
        room = method.capacity(layers, visual, 20, cost)
    except InfeasibleBudget:
        assume(False)
    bits = min(bits, np.log2(visual))
    plan = method.plan(layers, visual, bits, 20, cost)
    assert all(a <= b for a, b in zip(plan, room, strict=True))
