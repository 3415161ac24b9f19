"""Every family, attention backend, padding and kind of picture against the slow oracle."""

from __future__ import annotations

import functools
import itertools

import pytest
import torch

from autoprune import AutoPrune, Budget
from tests import oracle, zoo
from tests.scattered import DEEP, PRE_LLM, Scattered

TOLERANCE = 2e-4
BATCHES = ["single", "padded3", "padded3_text"]
SETTINGS = [
    pytest.param(name, attention, media, id=f"{name}-{attention}-{media}")
    for name, family in zoo.FAMILIES.items()
    for attention in family.attentions
    for media in family.media
]
METHODS = {
    "autoprune": AutoPrune(budget=Budget.ratio(0.5)),
    "deep": Scattered(DEEP),
    "pre_llm": Scattered(PRE_LLM),
}


def is_tried(setting, *numbers):
    """Whether a case, by its numbers, is tried with a setting: the attentions of a family take turns.

    In two families, and in those with one attention, every case is tried.
    """
    name, attention, _ = setting.values
    attentions = zoo.FAMILIES[name].attentions
    if name in zoo.EVERY_MODE or len(attentions) == 1:
        return True
    return (attentions.index(attention) + sum(numbers)) % 2 == 0


def cases(first, second):
    """The settings with the pairs of the two that each of them is tried with."""
    return [
        pytest.param(*setting.values, one, other, id=f"{setting.id}-{one}-{other}")
        for setting in SETTINGS
        for i, one in enumerate(first)
        for k, other in enumerate(second)
        if is_tried(setting, i, k)
    ]


model_of = functools.cache(zoo.build)


@pytest.mark.parametrize(
    ("name", "attention", "media", "batch", "method"), cases(BATCHES, ["deep", "pre_llm"])
)
def test_scattered_cuts_equal_the_oracle(name, attention, media, batch, method):
    check_oracle(name, attention, media, batch, method)


@pytest.mark.parametrize(
    ("name", "attention", "media", "batch"),
    [
        pytest.param(*setting.values, batch, id=f"{setting.id}-{batch}")
        for setting in SETTINGS
        for batch in (BATCHES if setting.values[0] in zoo.EVERY_MODE else BATCHES[2:])
    ],
)
def test_pruning_equals_the_oracle(name, attention, media, batch):
    check_oracle(name, attention, media, batch, "autoprune")


def check_oracle(name, attention, media, batch, method):
    model = model_of(name, attention)
    arguments = zoo.inputs(name, model, batch, media)
    oracle.plain_logits(model, arguments)  # transformers installs hooks of its own on first use
    hooks = hooks_of(model)
    result = oracle.compare(model, arguments, METHODS[method], steps=3)
    assert result.worst < TOLERANCE
    for sample, effect in zip(result.samples, result.effect, strict=True):
        if sample.tokens_per_layer[-1] < 0.5 * sample.num_visual:
            assert effect > 1.0
    assert hooks_of(model) == hooks


@pytest.mark.parametrize("schedules", [DEEP, PRE_LLM], ids=["deep", "pre_llm"])
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize(
    ("name", "attention"),
    [
        *itertools.product(["llava", "internvl"], ["sdpa", "eager"]),
        *((name, "sdpa") for name in ("llava_onevision", "idefics3", "mistral3")),
        # With sliding windows, a prefix that sees all of itself, and both.
        *itertools.product(["llava_sliding", "aya_vision", "paligemma"], ["sdpa", "eager"]),
        ("paligemma2", "eager"),
    ],
)
def test_compacted_positions_equal_the_oracle(name, attention, batch, schedules):
    model = model_of(name, attention)
    arguments = zoo.inputs(name, model, batch)
    method = Scattered(schedules, positions="compacted")
    assert oracle.compare(model, arguments, method, steps=3).worst < TOLERANCE


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "internvl"])
def test_staircases_equal_the_oracle(name, batch):
    model = model_of(name, "sdpa")
    method = AutoPrune(Budget.ratio(0.5), k0=2.0, mi_layer=0, cut_every=2)
    result = oracle.compare(model, zoo.inputs(name, model, batch), method, steps=3)
    assert result.worst < TOLERANCE
    for sample in result.samples:
        levels = sample.tokens_per_layer
        assert sum(levels) == round(zoo.LAYERS * 0.5 * sample.num_visual)
        assert levels[2::2][: len(levels[3::2])] == levels[3::2]


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "internvl"])
def test_a_straight_line_before_the_measurement_equals_the_oracle(name, batch):
    model = model_of(name, "sdpa")
    method = AutoPrune(Budget.ratio(0.5), prior="linear", mi_layer=2)
    result = oracle.compare(model, zoo.inputs(name, model, batch), method, steps=3)
    assert result.worst < TOLERANCE
    for sample in result.samples:
        levels, total = sample.tokens_per_layer, sample.num_visual
        assert sum(levels) == round(zoo.LAYERS * 0.5 * total)
        if total:
            line = [zoo.LAYERS - layer for layer in range(1, zoo.LAYERS)]
            share = (sum(levels) - total) / sum(line)
            assert levels[1:3] == pytest.approx([share * line[0], share * line[1]], abs=1)


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize(("name", "attention", "media"), SETTINGS)
def test_the_trace_says_what_the_prompts_hold_and_spends_the_budget(name, attention, media, batch):
    model = model_of(name, attention)
    arguments = zoo.inputs(name, model, batch, media)
    visual = zoo.visual_mask(model, arguments["input_ids"])
    with METHODS["autoprune"](model) as trace, torch.no_grad():
        model(**arguments)
    assert len(trace.samples) == len(visual)
    for row, sample in enumerate(trace.samples):
        real = arguments["attention_mask"][row].bool()
        assert sample.visual_positions.tolist() == visual[row, real].nonzero()[:, 0].tolist()
        assert sample.num_visual == visual[row].sum()
        assert sum(sample.tokens_per_layer) == round(zoo.LAYERS * 0.5 * sample.num_visual)
        assert [len(kept) for kept in sample.kept] == sample.tokens_per_layer
        assert sorted(sample.tokens_per_layer, reverse=True) == sample.tokens_per_layer


@pytest.mark.parametrize(
    ("name", "attention", "media", "batch", "budget"), cases(["single", "padded3_text"], [1000])
)
def test_a_budget_of_everything_is_the_plain_model_bit_for_bit(
    name, attention, media, batch, budget
):
    model = model_of(name, attention)
    arguments = zoo.inputs(name, model, batch, media)
    plain, tokens = oracle.generate_logits(model, arguments, steps=2)
    plain_by_hand = oracle.manual_logits(model, arguments, tokens[:, :2])
    with AutoPrune(budget=budget)(model) as trace:
        whole, same_tokens = oracle.generate_logits(model, arguments, steps=2)
        by_hand = oracle.manual_logits(model, arguments, tokens[:, :2])
    assert torch.equal(whole, plain)
    assert torch.equal(same_tokens, tokens)
    assert torch.equal(by_hand, plain_by_hand)
    for sample in trace.samples:
        assert sample.tokens_per_layer == [sample.num_visual] * zoo.LAYERS


@pytest.mark.parametrize("name", zoo.FAMILIES)
def test_a_prompt_gets_in_a_batch_what_it_gets_alone(name):
    model = model_of(name, "eager")
    with METHODS["autoprune"](model) as trace, torch.no_grad():
        model(**zoo.inputs(name, model, "padded3_text"))
        for row in range(3):
            model(**zoo.inputs(name, model, "padded3_text", only=row))
    together, alone = trace.samples[:3], trace.samples[3:]
    for first, second in zip(together, alone, strict=True):
        assert first.mutual_information == pytest.approx(second.mutual_information, abs=1e-4)
        assert first.tokens_per_layer == second.tokens_per_layer
        assert [k.tolist() for k in first.kept] == [k.tolist() for k in second.kept]


@pytest.mark.parametrize("padding_side", ["left", "right"])
@pytest.mark.parametrize("name", zoo.FAMILIES)
def test_a_plain_forward_returns_the_oracles_rows_in_their_places(name, padding_side):
    model = model_of(name, zoo.FAMILIES[name].attentions[0])
    arguments = zoo.inputs(name, model, "padded3", padding_side=padding_side)
    with METHODS["deep"](model) as trace, torch.no_grad():
        actual = model(**arguments).logits
    mask = arguments["attention_mask"]
    columns = oracle.columns_from_trace(trace.samples, mask, zoo.LAYERS)
    expected = oracle.oracle_forward(model, arguments, columns)
    alive = columns[-1] & mask.bool()
    assert alive.sum() < mask.sum()
    torch.testing.assert_close(actual[alive], expected[alive], atol=TOLERANCE, rtol=0)


def hooks_of(model):
    """Every forward hook on the model."""
    kinds = ("_forward_pre_hooks", "_forward_hooks")
    return [getattr(module, kind).copy() for module in model.modules() for kind in kinds]
