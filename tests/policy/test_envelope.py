"""Room for a schedule before its prompt is seen: never too little, and not much too much."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

import autoprune
from autoprune import AutoPrune, Budget
from autoprune.methods import METHODS
from autoprune.policy.adaptive import Sizes
from autoprune.policy.budget import InfeasibleBudget
from autoprune.policy.cost import DecoderCost
from autoprune.policy.curves import CURVES
from tests.policy.examples import examples

SEEN = 64


def costs(draw, layers):
    hidden = draw(st.sampled_from([8, 64, 512, 4096]))
    wide = draw(st.sampled_from([1, hidden, 3 * hidden]))
    return DecoderCost(layers, hidden, hidden // 8, hidden // 8, 8, wide)


def budgets(draw, layers, visual, text, cost):
    share = draw(st.floats(0.01, 1))
    kind = draw(st.sampled_from(["tokens", "leaving", "ratio", "flops", "kv_bytes"]))
    if kind == "kv_bytes":
        full = cost.kv_bytes([visual] * layers, text)
        return Budget.kv_bytes(max(1, int(share * full)))
    if kind in ("ratio", "flops"):
        return Budget(kind, share)
    return Budget.tokens(share * visual, counted="leaving" if kind == "leaving" else "entering")


@st.composite
def settings(draw):
    """A method, and a size of prompt on a model."""
    layers = draw(st.integers(2, 40))
    visual = draw(st.one_of(st.integers(1, 40), st.integers(1, 3000)))
    text = draw(st.integers(0, 200))
    cost = costs(draw, layers)
    first_cut = draw(st.sampled_from(["after_layer_0", "pre_llm", "peek"]))
    measured = st.integers(0, min(layers - 2, 4))
    method = AutoPrune(
        budgets(draw, layers, visual, text, cost),
        k0=draw(st.floats(0, 3)),
        gamma=draw(st.one_of(st.floats(-1, 3), st.just(0.0))),
        x0=draw(st.floats(-20, 50)),
        beta=draw(st.one_of(st.floats(-5, 5), st.just(0.0))),
        curve=draw(st.sampled_from(sorted(CURVES))),
        mi_layer=draw(measured | st.just("peek") if first_cut == "peek" else measured),
        prior=draw(st.sampled_from(["curve", "linear"])),
        cut_every=draw(st.sampled_from([1, 2, 5])),
        first_cut=first_cut,
        noise=draw(st.sampled_from([0.0, 1.0])),
    )
    return method, layers, visual, text, cost


def plans(method, layers, visual, text, cost, bits):
    """`AutoPrune.plan` for many prompts at once, [prompts, L]."""
    sizes = Sizes(layers, (visual,) * len(bits), (text,) * len(bits), cost)
    return method._schedule().after_measuring(sizes, bits)


@examples(200)
@given(settings(), st.integers(0, 2**32))
def test_no_prompt_needs_more_than_the_capacity(setting, seed):
    method, layers, visual, text, cost = setting
    try:
        capacity = method.capacity(layers, visual, text, cost)
    except InfeasibleBudget:
        assume(False)
    most = (1 + method.noise) * np.log2(visual)
    rng = np.random.default_rng(seed)
    # As likely in any order of magnitude, and both ends.
    bits = most * np.concatenate([rng.random(SEEN), 10.0 ** -rng.uniform(0, 6, SEEN), [0, 1]])
    seen = plans(method, layers, visual, text, cost, bits)
    assert (seen <= capacity).all()
    assert capacity == sorted(capacity, reverse=True)
    decided = 0 if method.mi_layer == "peek" else method.mi_layer + 1
    assert (seen[:, :decided] == capacity[:decided]).all()


@examples(100)
@given(settings(), st.floats(0, 1), st.integers(0, 2**32))
def test_the_room_of_less_text_is_enough_for_more(setting, share, seed):
    method, layers, visual, text, cost = setting
    try:
        room = method.capacity(layers, visual, int(share * text), cost)
        bits = (1 + method.noise) * np.log2(visual) * np.random.default_rng(seed).random(SEEN)
        seen = plans(method, layers, visual, text, cost, bits)
    except InfeasibleBudget:
        assume(False)
    assert (seen <= room).all()


@pytest.mark.parametrize("curve", CURVES)
@pytest.mark.parametrize(("layers", "visual", "budget"), [(32, 576, 64), (28, 2880, 320)])
def test_capacity_is_hardly_more_than_the_largest_plan(curve, layers, visual, budget):
    method = AutoPrune(budget, curve=curve)
    bits = np.linspace(0, np.log2(visual), 2000)
    largest = plans(method, layers, visual, 0, None, bits).max(axis=0)
    assert sum(method.capacity(layers, visual)) <= 1.03 * largest.sum()


@pytest.mark.parametrize("budget", [Budget.tokens(60), Budget.flops(0.7)])
def test_no_room_is_kept_for_what_cannot_be_left_over(budget):
    cost = DecoderCost(2, 64, 8, 8, 8, 128)
    method = AutoPrune(budget, mi_layer=0, cut_every=4)
    assert method.capacity(2, 100, 10, cost) == replace(method, cut_every=1).capacity(
        2, 100, 10, cost
    )


PLANNED = [name for name in METHODS if not name.startswith("autoprune")]


@pytest.mark.parametrize("name", PLANNED)
def test_a_schedule_that_is_known_is_the_capacity(name):
    method = autoprune.create(name, budget=Budget.ratio(0.4))
    assert method.capacity(32, 576) == method.plan(32, 576)


def test_a_method_that_plans_nothing_may_keep_everything():
    assert autoprune.create("autoprune_reference", budget=64).capacity(4, 10) == [10] * 4


def test_without_visual_tokens_no_room_is_needed():
    assert AutoPrune(64).capacity(4, 0) == [0] * 4
