"""The forward argument that holds the cache: the one place that knows its names.

transformers 5.24 renamed `past_key_values` to `cache`, in forwards, in `generate` and in outputs; the old
name is accepted until 5.40. Before 5.24, `cache` was what continuous batching passed.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers.cache_utils import Cache

NAMES = ("cache", "past_key_values")


def cache_of(arguments: Mapping[str, Any]) -> Any:
    """The cache among keyword arguments, or of a model's output; None if there is none."""
    for name in NAMES:
        if (cache := arguments.get(name)) is not None:
            return cache
    return None


def without_cache(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The keyword arguments with no cache, whatever it is called there."""
    return {name: value for name, value in arguments.items() if name not in NAMES}


def is_paged(cache: Any) -> bool:
    """Whether it is the cache of continuous batching, which holds the keys of other requests, too."""
    if cache is None or isinstance(cache, Cache):
        return False
    from transformers.generation.continuous_batching import PagedAttentionCache

    return isinstance(cache, PagedAttentionCache)


def as_argument(model: nn.Module, cache: Any) -> dict[str, Any]:
    """The cache as keyword argument of the model's forward, by the name that this release has for it."""
    taken = inspect.signature(model.forward).parameters
    return {next(name for name in NAMES if name in taken): cache}
