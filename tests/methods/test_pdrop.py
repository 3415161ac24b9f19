"""PyramidDrop: the staircase of a budget, and which tokens the last word keeps."""

from __future__ import annotations

import pytest
import torch

from autoprune import Budget
from autoprune.methods.pdrop import PDrop
from autoprune.policy.budget import InfeasibleBudget
from autoprune.policy.cost import DecoderCost
from tests import zoo


def staircase(share, layers, total=576, depth=32):
    """Every layer's tokens at a lambda, straight from the description."""
    counts = []
    for layer in range(depth):
        steps = sum(layer >= first for first in layers)
        counts.append(total if not steps else max(1, round(total * share**steps)))
    return counts


@pytest.mark.parametrize(("budget", "share"), [(192, 0.581), (128, 0.449), (64, 0.225)])
def test_small_budgets_take_the_early_layers_at_the_published_ratios(budget, share):
    plan = PDrop(budget).plan(32, 576)
    candidates = [staircase(i / 10_000, (2, 6, 15)) for i in range(10_001)]
    affordable = [counts for counts in candidates if sum(counts) <= 32 * budget]
    assert plan == max(affordable, key=sum)
    assert plan[2] / 576 == pytest.approx(share, abs=2e-3)


def test_the_official_setting_comes_out_at_its_own_price():
    official = staircase(0.5, (8, 16, 24))
    assert sum(official) == 32 * 270
    assert PDrop(270).plan(32, 576) == official
    assert PDrop(Budget.ratio(270 / 576)).plan(32, 576) == official
    assert PDrop(269).plan(32, 576)[2] < 576
    assert PDrop(400).plan(32, 576)[:8] == [576] * 8


def test_layers_that_are_asked_for_are_used_at_any_ratio():
    plan = PDrop(192, layers=(8, 16, 24)).plan(32, 576)
    assert [plan[7], plan[8]] == [576, plan[15]]
    assert plan[8] > plan[16] > plan[24] >= 1
    assert 32 * 192 - 32 < sum(plan) <= 32 * 192
    with pytest.raises(InfeasibleBudget, match=r"tokens\(144.75\)"):
        PDrop(100, layers=(8, 16, 24)).plan(32, 576)


@pytest.mark.parametrize(
    "layers", [(), (0, 8), (8, 8), (16, 8), (8, 32), (float("nan"),), "2,6,15", 8]
)
def test_layers_that_do_not_rise_within_the_depth_are_refused(layers):
    with pytest.raises(ValueError, match="layers must be a tuple of rising numbers"):
        PDrop(64, layers=layers)


def test_a_static_cache_is_large_enough_whichever_layers_the_text_tips_the_choice_to():
    cost = DecoderCost(32, 4096, 32, 32, 128, 11008)
    official = staircase(0.5, (8, 16, 24))
    method = PDrop(Budget.kv_bytes(int(cost.kv_bytes(official, 60))))
    room = method.capacity(32, 576, 20, cost)
    plans = [method.plan(32, 576, text, cost) for text in range(20, 120, 5)]
    assert plans[0][2] == 576 > plans[-1][2], "both choices occur"
    assert all(plan[layer] <= room[layer] for plan in plans for layer in range(32))
    assert PDrop(270).capacity(32, 576) == PDrop(270).plan(32, 576)


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_the_first_cut_keeps_what_the_last_token_attends_to_in_the_layer_behind_it(family):
    model = zoo.build(family, "eager")
    inputs = zoo.inputs(family, model, "padded3")
    with torch.no_grad():
        attentions = model(**inputs, output_attentions=True).attentions
        with PDrop(Budget.ratio(0.5))(model) as trace:
            model(**inputs)
    visual = zoo.visual_mask(model, inputs["input_ids"])
    for row, sample in enumerate(trace.samples):
        cut = next(i for i, n in enumerate(sample.tokens_per_layer) if n < sample.num_visual)
        columns = visual[row].nonzero().squeeze(1)
        last = inputs["attention_mask"][row].nonzero().max()
        scores = attentions[cut][row, :, last, columns].mean(dim=0)
        best = scores.topk(sample.tokens_per_layer[cut]).indices.sort().values
        assert sample.kept[cut].tolist() == best.tolist()
        before = attentions[cut - 1][row, :, last, columns].mean(dim=0)
        other = before.topk(sample.tokens_per_layer[cut]).indices.sort().values
        assert other.tolist() != best.tolist(), "else the test could not tell the layers apart"
