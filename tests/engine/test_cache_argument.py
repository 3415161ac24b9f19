"""The cache has two names, depending on the release of transformers; pruning takes both."""

from __future__ import annotations

import functools
import inspect
import warnings

import pytest
import torch
from transformers import DynamicCache

from autoprune.engine.cache import argument as cache_argument
from tests import oracle, zoo
from tests.scattered import DEEP, Scattered

STEPS = 2
close = functools.partial(torch.testing.assert_close, atol=2e-4, rtol=0)


def names_taken(model):
    """What this release calls the cache, and the older name where that is still accepted."""
    taken = inspect.signature(model.forward).parameters
    return cache_argument.NAMES if "cache" in taken else ("past_key_values",)


@pytest.mark.parametrize("name", cache_argument.NAMES)
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_a_cache_is_found_by_any_of_its_names(family, name):
    model = zoo.build(family)
    if name not in names_taken(model):
        pytest.skip("this release has no such argument")
    inputs = zoo.inputs(family, model, "padded3")
    with Scattered(DEEP)(model), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of the older name
        expected, tokens = oracle.generate_logits(model, inputs, STEPS)
        actual, same = oracle.generate_logits(model, inputs, STEPS, **{name: DynamicCache()})
        by_hand = plain_forwards(model, inputs, tokens[:, :STEPS], name)
    assert torch.equal(same, tokens)
    assert torch.equal(actual, expected)
    close(actual, by_hand)


def plain_forwards(model, inputs, tokens, name):
    """The same with `model(...)`, without `generate`; [batch, steps + 1, vocabulary]."""
    mask, cache, past = inputs["attention_mask"], {name: DynamicCache()}, {}
    rows = [model(**inputs, **cache).logits[:, -1]]
    deltas = getattr(model.base_model, "rope_deltas", None)
    for step in range(tokens.shape[1]):
        mask = torch.nn.functional.pad(mask, (0, 1), value=1)
        if deltas is not None:  # M-RoPE families cannot derive positions from a padded mask
            past = {"position_ids": (mask.sum(dim=1, keepdim=True) - 1 + deltas).expand(3, -1, -1)}
        out = model(input_ids=tokens[:, step : step + 1], attention_mask=mask, **cache, **past)
        rows.append(out.logits[:, -1])
    return torch.stack(rows, dim=1)


def test_a_cache_is_passed_by_the_name_that_the_model_takes():
    model = zoo.build("llava")
    (name,) = cache_argument.as_argument(model, cache := DynamicCache())
    assert name in inspect.signature(model.forward).parameters
    assert cache_argument.cache_of({name: cache}) is cache
    assert cache_argument.without_cache({name: cache, "use_cache": True}) == {"use_cache": True}


def test_only_the_cache_of_continuous_batching_is_paged():
    from transformers.generation.continuous_batching import PagedAttentionCache

    assert cache_argument.is_paged(object.__new__(PagedAttentionCache))
    assert not any(map(cache_argument.is_paged, (None, DynamicCache(), object())))
