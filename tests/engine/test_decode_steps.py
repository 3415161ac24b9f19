"""What pruning adds to a decode step: nothing, but for what a ragged batch needs."""

from __future__ import annotations

import functools
from collections import Counter

import pytest
import torch
from transformers import DynamicCache, LlavaConfig, StaticCache

from autoprune import AutoPrune, Budget
from autoprune.bench.variants import Replay
from tests import zoo
from tests.counting import launches
from tests.scattered import DEEP, PRE_LLM, Scattered
from tests.zoo_families import FAMILIES, Family, llava

METHODS = {
    "autoprune": AutoPrune(Budget.ratio(0.5)),
    "deep": Scattered(DEEP),
    "pre_llm": Scattered(PRE_LLM),
}
# Eight prompts that lose more and more, in all layers but the first.
RAGGED = tuple((16, *(range(16 - prompt, 11 - prompt, -1))) for prompt in range(8))


@functools.cache
def model_of(kv_heads: int, attention: str):
    def config() -> LlavaConfig:
        return llava(num_key_value_heads=kv_heads)

    family = Family(config, FAMILIES["llava"].model, FAMILIES["llava"].image)
    return zoo.build_family(family, attention)


def eight(model):
    """Eight prompts of one length whose pictures differ."""
    inputs = [zoo.inputs("llava", model, seed=seed) for seed in range(8)]
    return {name: torch.cat([one[name] for one in inputs]) for name in inputs[0]}


def step(model, cache, prompts):
    return model(input_ids=torch.full((prompts, 1), 7), past_key_values=cache).logits


@pytest.fixture(autouse=True)
def no_gradients():
    # In inference mode torch would show attention in one piece, whatever it does with a mask.
    with torch.no_grad():
        yield


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_a_step_of_one_prompt_launches_nothing_more_than_the_plain_model(method, attention):
    model = model_of(2, attention)
    inputs = zoo.inputs("llava", model)
    plain = model(**inputs, use_cache=True).past_key_values
    with launches() as expected:
        step(model, plain, 1)
    with method(model):
        cache = model(**inputs, use_cache=True).past_key_values
        with launches() as counted:
            step(model, cache, 1)
    # Eager attention adds a mask that shows everything; here it is left out.
    spared = {"aten::add.Tensor": zoo.LAYERS} if attention == "eager" else {}
    assert expected - counted == spared
    assert not counted - expected


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kv_heads", [2, 4])
def test_a_step_of_a_ragged_batch_launches_nothing_more_than_masks_need(kv_heads, attention):
    """Nothing at all, where transformers does not copy grouped keys for attention with a mask."""
    model = model_of(kv_heads, attention)
    inputs = eight(model)
    plain = model(**inputs, use_cache=True).past_key_values
    step(model, plain, 8)
    with launches() as expected:
        step(model, plain, 8)
    with Replay(RAGGED)(model):
        cache = model(**inputs, use_cache=True).past_key_values
        # The first step makes masks, with room for many more.
        step(model, cache, 8)
        with launches() as counted:
            step(model, cache, 8)
    copies = {"aten::clone"} if kv_heads < zoo.HEADS and attention == "sdpa" else set()
    assert set(counted - expected) <= copies


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(
    ("method", "prompts"), [(METHODS["deep"], 1), (Replay(RAGGED), 8)], ids=["one", "ragged"]
)
def test_a_step_on_a_static_cache_makes_one_mask_for_all_layers(method, prompts, attention):
    model = model_of(4, attention)
    inputs = zoo.inputs("llava", model) if prompts == 1 else eight(model)
    text = model.config.get_text_config()

    def second_step():
        cache = StaticCache(config=text, max_cache_len=inputs["input_ids"].shape[1] + 2)
        model(**inputs, past_key_values=cache)
        step(model, cache, prompts)
        with launches() as counted:
            step(model, cache, prompts)
        return counted

    expected = second_step()
    with method(model):
        counted = second_step()
    # Where the first new token is, and which slots see it, as numbers to be added.
    added = {"sub.Tensor", "le.Tensor", "zeros", "scalar_tensor", "where.self"}
    assert counted - expected <= Counter(f"aten::{name}" for name in added)
    # The plain model's mask is converted in each layer.
    spared = {"aten::where.self"} if attention == "sdpa" else set()
    assert spared <= set(expected - counted)


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_a_step_of_one_prompt_is_that_of_the_plain_model(method):
    model, cache = model_of(2, "sdpa"), DynamicCache()
    inputs = zoo.inputs("llava", model)
    handle = method.attach(model)
    model(**inputs, past_key_values=cache)
    expected = step(model, cache, 1)
    cache.crop(-1)
    handle.detach()
    assert torch.equal(step(model, cache, 1), expected)
