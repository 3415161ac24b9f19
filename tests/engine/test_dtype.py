"""A model that is cast to another dtype while it is pruned: a budget of bytes follows."""

from __future__ import annotations

import pytest
import torch

from autoprune import AutoPrune, Budget, create
from tests import zoo

VISUAL, TEXT, MEAN = 16, 3, 4


def price(model):
    """Bytes of one token in one layer's cache."""
    heads, size = model.config.text_config.num_key_value_heads, model.get_decoder().dtype.itemsize
    return 2 * heads * zoo.HEAD_DIM * size


def budget():
    """What pays for MEAN visual tokens in each layer in float32, beside the text."""
    return Budget.kv_bytes(zoo.LAYERS * (TEXT + MEAN) * price(zoo.build("llava")))


def prefill(model, **options):
    """One forward of a prompt with little text."""
    inputs = zoo.inputs("llava", model)
    inputs |= {name: inputs[name][:, 5:-6] for name in ("input_ids", "attention_mask")}
    pixels = inputs["pixel_values"].to(model.get_decoder().dtype)
    with torch.no_grad():
        return model(**inputs | {"pixel_values": pixels}, **options)


@pytest.mark.parametrize("name", ["autoprune", "fastv"])
def test_a_budget_of_bytes_is_spent_in_the_present_dtype(name):
    model, method = zoo.build("llava"), create(name, budget())
    handle = method.attach(model)
    for dtype in (torch.float32, torch.bfloat16, torch.float32):
        model.to(dtype)
        cache = prefill(model, use_cache=True).past_key_values
        sample, allowed = handle.trace.samples[-1], method.budget.value
        held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
        assert held == sample.kv_bytes <= allowed
        assert sample.kv_bytes_full == zoo.LAYERS * (VISUAL + TEXT) * price(model)
        if name == "autoprune":
            assert held == allowed, "to the last token"
    handle.detach()
    spent = [sum(sample.tokens_per_layer) for sample in handle.trace.samples]
    assert spent[0] == spent[2] < spent[1]
    if name == "autoprune":
        # Half the bytes pay for twice the tokens, text included.
        assert spent == [zoo.LAYERS * n for n in (MEAN, 2 * MEAN + TEXT, MEAN)]


def test_a_static_cache_is_for_the_dtype_it_was_made_in():
    model = zoo.build("llava")
    handle = AutoPrune(budget()).attach(model)
    wide = handle.static_cache(VISUAL, TEXT, 4)
    prefill(model, past_key_values=wide)
    model.bfloat16()
    wide.reset()
    with pytest.raises(ValueError, match=r"made for a model of 4 bytes per number, .* has 2"):
        prefill(model, past_key_values=wide)
    narrow = handle.static_cache(VISUAL, TEXT, 4)
    prefill(model, past_key_values=narrow)
    handle.detach()
    first, second = handle.trace.samples
    assert sum(narrow.room) > sum(wide.room)
    assert sum(second.tokens_per_layer) > sum(first.tokens_per_layer)
