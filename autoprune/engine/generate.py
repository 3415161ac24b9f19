"""What `model.generate` does that its forwards do not show: its methods are wrapped while pruning is on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any

import torch

from ..errors import UnsupportedError
from .cache.argument import cache_of
from .cache.pruned import MEMORY, CacheMemory
from .cache.static import PrunedStaticCache
from .patch import Around
from .vision.observer import has_pixels, same_features


def drafts_follow(cache: Any) -> bool:
    """Whether this forward is the first of assisted decoding, which sends drafts along; true only once."""
    memory: CacheMemory | None = getattr(cache, MEMORY, None)
    if memory is None:
        return False
    follow, memory.drafts_follow = memory.drafts_follow, False
    return follow


def _prefilling(prefill: Callable) -> Callable:
    """Refuse a prefill in chunks, whose first forward looks like any other, and more new tokens than a
    static cache was made for.
    """

    @wraps(prefill)
    def wrapped(
        input_ids: Any, generation_config: Any, model_kwargs: Any, *args: Any, **kwargs: Any
    ) -> Any:
        if getattr(generation_config, "prefill_chunk_size", None) is not None:
            raise UnsupportedError(
                "a prefill in chunks cannot be pruned, since a chunk does not see the whole "
                "question; leave prefill_chunk_size at None"
            )
        cache = cache_of(model_kwargs)
        if isinstance(cache, PrunedStaticCache):
            cache.refuse_length(generation_config.max_length - input_ids.shape[1])
        return prefill(input_ids, generation_config, model_kwargs, *args, **kwargs)

    return wrapped


def _drafting(get_generator: Callable) -> Callable:
    """Note on the cache that drafts will come."""

    @wraps(get_generator)
    def wrapped(*args: Any, model_kwargs: Any, **kwargs: Any) -> Any:
        if (cache := cache_of(model_kwargs)) is not None:
            CacheMemory.of(cache).drafts_follow = True
        return get_generator(*args, model_kwargs=model_kwargs, **kwargs)

    return wrapped


def _repeating(expand: Callable) -> Callable:
    """Let features that are given to `generate` stay what they are: they are repeated in place there."""

    @wraps(expand)
    def wrapped(
        input_ids: Any, mm_encoder_output: Mapping[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        own = {medium: same_features(output) for medium, output in mm_encoder_output.items()}
        return expand(input_ids, own, *args, **kwargs)

    return wrapped


def around_copying(tell: Callable[[int], None]) -> dict[str, Around]:
    """Have `generate` tell how many copies it makes of each prompt, for beams and several answers."""

    def around(expand: Callable) -> Callable:
        @wraps(expand)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            tell(kwargs.get("expand_size", args[0] if args else 1))
            return expand(*args, **kwargs)

        return wrapped

    return {"_expand_inputs_for_generation": around}


def around_encoding(
    tell: Callable[[torch.Tensor, Any], None], forget: Callable[[], None]
) -> dict[str, Around]:
    """Have `generate` tell its prompt, ids and mask, before it computes features of pictures.

    The prompt is read from the device once more then, which only methods that merge in the tower ask for.
    Releases before 5.19 compute the features in the forward.
    """

    def around(encode: Callable) -> Callable:
        @wraps(encode)
        def wrapped(
            inputs: torch.Tensor,
            model_kwargs: Any,
            model_input_name: str,
            *args: Any,
            **kwargs: Any,
        ) -> Any:
            if model_input_name == "input_ids" and has_pixels(model_kwargs):
                tell(inputs, model_kwargs.get("attention_mask"))
            try:
                return encode(inputs, model_kwargs, model_input_name, *args, **kwargs)
            finally:
                forget()

        return wrapped

    return {"_maybe_prepare_encoder_kwargs_for_generation": around}


WRAPPERS = {
    "_prefill": _prefilling,
    "_get_candidate_generator": _drafting,
    "_expand_multimodal_outputs": _repeating,
}
