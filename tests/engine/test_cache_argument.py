"""The cache has two names, depending on the release of transformers; pruning takes both."""

from __future__ import annotations

import functools
import inspect
import warnings

import pytest
import torch
from transformers import DynamicCache

from autoprune.engine import cache_argument
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
        cache = DynamicCache()
        logits = model(**inputs, **{name: cache}).logits[:, -1]
        mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 1), value=1)
        step = model(input_ids=tokens[:, :1], attention_mask=mask, **{name: cache}).logits[:, -1]
    assert torch.equal(same, tokens)
    assert torch.equal(actual, expected)
    if family == "llava":  # the other derives the positions of padded prompts from more than a mask
        close(logits, expected[:, 0])
        close(step, expected[:, 1])


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
