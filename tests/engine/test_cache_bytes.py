"""Bytes that a trace and a budget count are those that the cache holds."""

from __future__ import annotations

import functools

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from autoprune import AutoPrune, Budget
from autoprune.bench.variants import Replay
from autoprune.engine.locate import locate
from tests import zoo, zoo_decoders
from tests.scattered import DEEP, PRE_LLM, Scattered

model_of = functools.cache(zoo.build)
latent_of = functools.cache(zoo_decoders.build)
SCHEDULE = (16, 12, 9, 5, 5, 1)


def held(cache):
    """Of keys and values, or of what a cache has in their place."""
    return [layer.keys.nbytes + layer.values.nbytes for layer in cache.layers]


def filled(model, inputs, method):
    with method(model) as trace, torch.no_grad():
        cache = model(**inputs, use_cache=True).past_key_values
    return trace.samples, held(cache)


@pytest.mark.parametrize("name", zoo.FAMILIES)
@pytest.mark.parametrize("schedules", [DEEP, PRE_LLM], ids=["deep", "pre_llm"])
def test_the_trace_counts_what_the_cache_of_a_prompt_holds(name, schedules):
    model = model_of(name, zoo.FAMILIES[name].attentions[0])
    for prompt in range(3):
        inputs = zoo.inputs(name, model, "padded3", only=prompt)
        (sample,), bytes_held = filled(model, inputs, Scattered(schedules))
        if not any(locate(model).windows):
            assert sample.kv_bytes == sum(bytes_held)
        assert sample.kv_bytes_full >= sample.kv_bytes


@pytest.mark.parametrize("kind", zoo_decoders.DECODERS)
def test_the_trace_counts_what_other_caches_hold(kind):
    model = latent_of(kind)
    inputs = zoo.inputs("llava", model)
    (sample,), bytes_held = filled(model, inputs, Replay((SCHEDULE,)))
    assert sample.kv_bytes == sum(bytes_held) < 0.8 * sample.kv_bytes_full


@pytest.mark.parametrize("build", [model_of, latent_of])
def test_each_layer_costs_what_enters_it(build):
    """A cut falls due in the layer that it is made before, and not one earlier or later."""
    model = build("llava" if build is model_of else "youtu")
    inputs, cost = zoo.inputs("llava", model), locate(model).cost
    (sample,), bytes_held = filled(model, inputs, Replay((SCHEDULE,)))
    of_token = cost.kv_bytes_per_token
    assert bytes_held == [(n + sample.num_text) * of_token for n in SCHEDULE]
    assert sample.tokens_per_layer == list(SCHEDULE)
    assert sample.kv_bytes == (sum(SCHEDULE) + len(SCHEDULE) * sample.num_text) * of_token


@pytest.mark.parametrize("kind", ["youtu", "mistral4"])
def test_a_budget_of_bytes_is_spent_on_latents(kind):
    model = latent_of(kind)
    inputs, cost = zoo.inputs("llava", model), locate(model).cost
    budget = 17_000
    (sample,), bytes_held = filled(model, inputs, AutoPrune(Budget.kv_bytes(budget)))
    assert budget - cost.kv_bytes_per_token < sum(bytes_held) == sample.kv_bytes <= budget


@torch.inference_mode()
def counted(model, **inputs):
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        out = model(**inputs, logits_to_keep=1)
    modules = counter.get_flop_counts().items()
    of_decoder = (n for name, n in modules if name.endswith("model.language_model"))
    return sum(next(of_decoder).values()), out


@pytest.mark.parametrize("kind", ["youtu", "minicpm3"])
def test_latent_attention_costs_what_torch_counts(kind):
    model = latent_of(kind)
    inputs, cost = zoo.inputs("llava", model), locate(model).cost
    length = inputs["input_ids"].shape[1]
    flops, out = counted(model, **inputs, use_cache=True)
    # Older releases multiply matrices for the angles of rotary positions, too.
    assert flops == pytest.approx(cost.prefill_flops([length] * cost.layers), rel=1e-4)
    step, _ = counted(model, input_ids=torch.tensor([[7]]), past_key_values=out.past_key_values)
    assert step == pytest.approx(cost.decode_flops([length] * cost.layers), rel=1e-4)
