"""What cannot be right is refused before it runs, and says why."""

from __future__ import annotations

import functools

import pytest
import torch

from autoprune.errors import UnsupportedError
from tests import oracle, zoo
from tests.scattered import DEEP, Scattered

METHOD = Scattered(DEEP)
model_of = functools.cache(zoo.build)


@pytest.fixture(params=zoo.EVERY_MODE)
def name(request):
    return request.param


@pytest.fixture
def model(name):
    return model_of(name, "sdpa")


@pytest.fixture
def inputs(name, model):
    return zoo.inputs(name, model, "padded3")


def embedded(model, inputs):
    """The same prompt as embeddings, pictures included."""
    seen = {}
    hook = model.get_decoder().register_forward_pre_hook(
        lambda _, args, kwargs: seen.update(kwargs), with_kwargs=True
    )
    with hook, torch.no_grad():
        model(**inputs, use_cache=False)
    names = ("inputs_embeds", "attention_mask", "position_ids")
    return {key: seen[key] for key in names if seen[key] is not None}


def test_embeddings_alone_do_not_say_what_is_visual(model, inputs):
    with pytest.raises(UnsupportedError, match="visual_mask"), METHOD(model):
        model(**embedded(model, inputs))


def test_embeddings_with_a_visual_mask_equal_the_oracle(model, inputs):
    prompt = embedded(model, inputs)
    mask = zoo.visual_mask(model, inputs["input_ids"])
    with METHOD(model, visual_mask=mask) as trace, torch.no_grad():
        actual = model(**prompt).logits[:, -1]
    columns = oracle.columns_from_trace(trace.samples, inputs["attention_mask"], zoo.LAYERS)
    expected = oracle.oracle_logits(model, inputs, columns)[:, 0]
    assert min(s.tokens_per_layer[-1] for s in trace.samples) < 16
    torch.testing.assert_close(actual, expected, atol=2e-4, rtol=0)


def test_new_pictures_in_a_later_turn(model, inputs):
    twice = torch.cat([inputs["attention_mask"]] * 2, dim=1)
    with METHOD(model):
        cache = oracle.Conversation(model, inputs).cache
        with pytest.raises(UnsupportedError, match="one prompt"):
            model(**inputs | {"attention_mask": twice}, past_key_values=cache, use_cache=True)


def test_a_chunked_prefill(model, inputs):
    with pytest.raises(UnsupportedError, match="chunk"), METHOD(model):
        model.generate(**inputs, max_new_tokens=2, prefill_chunk_size=16)


@pytest.mark.parametrize("family", ["gemma3", "llava_sliding"])
def test_static_caches_with_sliding_layers(family):
    model = model_of(family, "sdpa")
    inputs = zoo.inputs(family, model, "padded3")
    with pytest.raises(UnsupportedError, match="sliding"), METHOD(model):
        model.generate(
            **inputs, max_new_tokens=2, cache_implementation="static", disable_compile=True
        )


def test_training_mode(name, inputs):
    model = zoo.build(name, "sdpa").train()
    with pytest.raises(UnsupportedError, match="eval"), METHOD(model):
        model(**inputs)


def test_a_second_context_on_one_model(model, inputs):
    before = oracle.plain_logits(model, inputs)
    with METHOD(model) as trace:
        with pytest.raises(UnsupportedError, match="already"), METHOD(model):
            pass
        pruned = oracle.manual_logits(model, inputs, inputs["input_ids"][:, :0])
    assert len(trace.samples) == 3
    assert (pruned[:, 0] - before[:, 0]).abs().max() > 1.0
    assert torch.equal(oracle.plain_logits(model, inputs), before)
