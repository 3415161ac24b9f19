"""What `model.generate` does that its forwards do not show: its parts, watched while pruning is on."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import wraps
from typing import Any

from ..errors import UnsupportedError
from .cache.argument import cache_of
from .cache.pruned import DRAFTS
from .refusals import refuse_length
from .vision.tower import same_features


def take_drafts(cache: Any) -> bool:
    """Whether this forward is the first of assisted decoding, which sends drafts along; asked once."""
    return getattr(cache, "__dict__", {}).pop(DRAFTS, False)


def _prefilling(prefill: Callable) -> Callable:
    """Refuse a prefill in chunks, whose first forward looks like any other, and more new tokens than a
    static cache was made for.
    """

    @wraps(prefill)
    def watched(input_ids, generation_config, model_kwargs, *args, **kwargs):
        if getattr(generation_config, "prefill_chunk_size", None) is not None:
            raise UnsupportedError(
                "a prefill in chunks cannot be pruned, since a chunk does not see the whole "
                "question; leave prefill_chunk_size at None"
            )
        cache = cache_of(model_kwargs)
        refuse_length(cache, input_ids.shape[1], generation_config.max_length)
        return prefill(input_ids, generation_config, model_kwargs, *args, **kwargs)

    return watched


def _drafting(get_generator: Callable) -> Callable:
    """Note on the cache that drafts will come."""

    @wraps(get_generator)
    def watched(*args, model_kwargs, **kwargs):
        if (cache := cache_of(model_kwargs)) is not None:
            setattr(cache, DRAFTS, True)
        return get_generator(*args, model_kwargs=model_kwargs, **kwargs)

    return watched


def _repeating(expand: Callable) -> Callable:
    """Let features that are given to `generate` stay what they are: they are repeated in place there."""

    @wraps(expand)
    def watched(input_ids, mm_encoder_output: Mapping[str, Any], *args, **kwargs):
        own = {medium: same_features(output) for medium, output in mm_encoder_output.items()}
        return expand(input_ids, own, *args, **kwargs)

    return watched


class Repeats(threading.local):
    """How many copies `generate` makes of each prompt, for beams and several answers; 1 outside of it."""

    number = 1

    @contextmanager
    def counted(self) -> Iterator[None]:
        """One call of `generate`."""
        before, self.number = self.number, 1
        try:
            yield
        finally:
            self.number = before

    def expanding(self, expand: Callable) -> Callable:
        """`_expand_inputs_for_generation`, which makes the copies."""

        @wraps(expand)
        def watched(*args, **kwargs):
            self.number = kwargs.get("expand_size", args[0] if args else 1)
            return expand(*args, **kwargs)

        return watched


WATCHED = {
    "_prefill": _prefilling,
    "_get_candidate_generator": _drafting,
    "_expand_multimodal_outputs": _repeating,
}
