"""Families that are only tried in the core of the checks: each of these is one test for all of its claims."""

from __future__ import annotations

import functools

import pytest
import torch

from autoprune import AutoPrune, Budget
from autoprune.engine.locate import locate
from autoprune.engine.vision.maps import PATCH_LAYOUTS
from tests import oracle, zoo
from tests.engine.test_oracle_equality import TOLERANCE
from tests.engine.test_vision_scores import check_patches
from tests.scattered import PRE_LLM, Scattered

METHOD = AutoPrune(Budget.ratio(0.5))
# Of the layers of these only 1 and 4 attend.
RANKED_BEFORE = AutoPrune(Budget.ratio(0.5), first_cut="pre_llm", mi_layer=1)
METHODS = dict.fromkeys(["qwen3_5", "qwen3_5_moe", "lfm2_vl"], RANKED_BEFORE)
SETTINGS = [
    pytest.param(name, attention, media, id=f"{name}-{attention}-{media}")
    for name, family in zoo.CORE.items()
    for attention in family.attentions
    # Videos differ from pictures in the tower and in positions alone.
    for media in (family.media if attention == family.attentions[0] else ("image",))
]
SCORED = [
    pytest.param(name, media, id=f"{name}-{media}")
    for name, family in zoo.CORE.items()
    for media in family.media
    if getattr(PATCH_LAYOUTS.get(family.config().model_type), media, None)
]
PATCHES_TRIED = 4
model_of = functools.cache(zoo.build)


@pytest.mark.parametrize(("name", "attention", "media"), SETTINGS)
def test_a_family_is_pruned_as_the_oracle_says(name, attention, media):
    model, whole = model_of(name, attention), len(zoo.CORE[name].attentions) == 1
    if attention == "eager":
        arguments = zoo.inputs(name, model, "padded3", media)
        result = oracle.compare(model, arguments, Scattered(PRE_LLM), steps=3)
        assert result.worst < TOLERANCE
    if attention == "sdpa" or whole:
        arguments = zoo.inputs(name, model, "padded3_text", media)
        result = oracle.compare(model, arguments, METHODS.get(name, METHOD), steps=3)
        assert result.worst < TOLERANCE
        check_budgets(arguments, zoo.visual_mask(model, arguments["input_ids"]), result)


def check_budgets(arguments, visual, result):
    """The trace says what the prompts hold, spends the budget, and pruning changes the logits a lot."""
    for row, (sample, effect) in enumerate(zip(result.samples, result.effect, strict=True)):
        real = arguments["attention_mask"][row].bool()
        assert sample.visual_positions.tolist() == visual[row, real].nonzero()[:, 0].tolist()
        assert sum(sample.tokens_per_layer) == round(zoo.LAYERS * 0.5 * sample.num_visual)
        if sample.tokens_per_layer[-1] < 0.5 * sample.num_visual:
            assert effect > 1.0


@pytest.mark.parametrize("name", zoo.CORE)
def test_a_budget_of_everything_is_the_plain_model_bit_for_bit(name):
    model = model_of(name, zoo.CORE[name].attentions[0])
    arguments = zoo.inputs(name, model, "padded3_text")
    # Where layers share keys, `generate` skips some work that pruning does: equal, but not in every bit.
    with torch.no_grad():
        plain = run(model, arguments)
        with AutoPrune(budget=1000)(model):
            assert torch.equal(run(model, arguments), plain)


def run(model, arguments):
    if locate(model).shares_keys:
        return model(**arguments).logits
    return oracle.generate_logits(model, arguments, steps=1)[0]


@pytest.mark.parametrize("name", zoo.CORE)
def test_a_prompt_gets_in_a_batch_what_it_gets_alone(name):
    model = model_of(name, zoo.CORE[name].attentions[0])
    with METHODS.get(name, METHOD)(model) as trace, torch.no_grad():
        model(**zoo.inputs(name, model, "padded3"))
    together = trace.samples
    with METHODS.get(name, METHOD)(model) as trace, torch.no_grad():
        model(**zoo.inputs(name, model, "padded3", only=2))
    assert trace.samples[0].tokens_per_layer == together[2].tokens_per_layer
    assert trace.samples[0].kept[-1].tolist() == together[2].kept[-1].tolist()


@pytest.mark.parametrize(("name", "media"), SCORED)
def test_a_patch_scores_exactly_the_tokens_it_makes(name, media, monkeypatch):
    model = model_of(name, "eager")
    arguments = zoo.inputs(name, model, "padded3", media)
    check_patches(monkeypatch, model, arguments, PATCHES_TRIED)
