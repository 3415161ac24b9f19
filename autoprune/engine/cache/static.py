"""A static cache that is as long in every layer as pruning leaves a prompt there."""

from __future__ import annotations

import numbers
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers.cache_utils import StaticCache, StaticLayer

from ...contract import MethodContract, ModelShape
from ...errors import UnsupportedError
from ..tokens.layout import Layout

if TYPE_CHECKING:
    from ..locate import Located

# How finely room is planned over the lengths of text, where a budget pays for both.
TEXT_PIECES = 8


class ShortLayer(StaticLayer):
    """A static layer with room for fewer tokens than the prompt has.

    The model makes one mask for all layers and asks a layer how wide; it is told of the whole prompt.
    """

    def __init__(self, max_cache_len: int, mask_length: int):
        super().__init__(max_cache_len=max_cache_len)
        self.mask_length = mask_length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.mask_length, 0

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if key_states.shape[-2] > self.max_cache_len:
            raise ValueError(
                f"a layer of this cache has room for {self.max_cache_len} tokens of a pruned prompt, "
                f"and is given {key_states.shape[-2]}; use it while the method that it was made for "
                "is attached, and reset it before"
            )
        return super().update(key_states, value_states, *args, **kwargs)


class PrunedStaticCache(StaticCache):
    """A static cache with a length of its own in every layer; see `Attachment.static_cache`.

    Layer l has room for `Method.capacity` of the largest prompt, its other tokens and the new ones.
    """

    def __init__(
        self,
        located: Located,
        method: MethodContract,
        shape: ModelShape,
        num_visual: int | Sequence[int],
        num_text: int,
        max_new_tokens: int,
    ):
        several = isinstance(num_visual, Sequence)
        sizes = _counts("num_visual", num_visual if several else [num_visual], least=1)
        (self.num_text,) = _counts("num_text", [num_text], least=0)
        (new,) = _counts("max_new_tokens", [max_new_tokens], least=1)
        self.max_new_tokens = new
        _refuse_backend(located)
        width = max(sizes) + self.num_text + new
        super().__init__(config=located.text.config, max_cache_len=width)
        _refuse_layers(self.layers, shape.num_layers)
        self.method, self.shape = method, shape
        self.sizes, self.largest = {0, *sizes}, max(sizes)
        self.room = np.max([self._room_for(size) for size in self.sizes], axis=0)
        self.layers = [ShortLayer(room + new, width) for room in self.room.tolist()]

    def _room_for(self, num_visual: int) -> np.ndarray:
        """Tokens that a prompt with so many visual ones can have in each layer, [L]."""
        priced = self.method.budget.kind in ("flops", "kv_bytes")
        step = 1 + self.num_text // (TEXT_PIECES if priced else 1)
        room = np.zeros(self.shape.num_layers, dtype=np.int64)
        for least in range(0, self.num_text + 1, step):
            # Less text never means fewer visual tokens.
            counts = self.method.capacity(self.shape.num_layers, num_visual, least, self.shape.cost)
            # The last token of a prompt that ends with its picture is in every layer.
            counts = np.maximum(counts, 1) if num_visual else np.asarray(counts)
            most = min(least + step - 1, self.num_text)
            # Before the first cut the padding of the prompt is there, too.
            text = np.where(counts == num_visual, self.num_text, most)
            room = np.maximum(room, counts + text)
        return room

    def admit(self, method: MethodContract, shape: ModelShape, layout: Layout) -> None:
        """Refuse prompts that do not fit, before anything of them is computed.

        Raises:
            ValueError: more visual or other tokens, another batch size or another method than the
                cache was made for, or a budget of bytes in another dtype.
        """
        if method is not self.method and method != self.method:
            raise ValueError(
                f"this static cache was made for {self.method}, but the model is pruned by {method}; "
                "make one with static_cache() of the attached handle"
            )
        made, size = self.shape.cost.dtype_bytes, shape.cost.dtype_bytes
        if method.budget.kind == "kv_bytes" and size != made:
            raise ValueError(
                f"this static cache was made for a model of {made} bytes per number, which by now has {size}: "
                "the budget pays for another number of tokens; make one with static_cache()"
            )
        batch, length = layout.real.shape
        first = self.layers[0]
        if first.is_initialized and first.batch_size != batch:
            raise ValueError(
                f"this static cache holds a batch of {first.batch_size}, and is given one of {batch}; "
                "make a cache for each batch size"
            )
        text = max(*layout.num_text, length - max(layout.num_visual))
        if text > self.num_text:
            raise ValueError(
                f"this static cache was made for num_text={self.num_text}, and the prompt has {text} "
                "tokens that are not visual, padding included; make one with more"
            )
        for size in set(layout.num_visual) - self.sizes:
            if size > self.largest or (self._room_for(size) > self.room).any():
                raise ValueError(
                    f"a prompt with {size} visual tokens may not fit into this static cache, which was "
                    f"made for {sorted(self.sizes - {0})}; make one with static_cache(num_visual=[...]) "
                    "for all sizes that occur"
                )
            self.sizes.add(size)


def _counts(name: str, given: Sequence[Any], least: int) -> list[int]:
    if not given or any(not isinstance(n, numbers.Integral) or n < least for n in given):
        raise ValueError(f"{name} must be a whole number of tokens from {least} on, got {given}")
    return [int(n) for n in given]


def _refuse_backend(located: Located) -> None:
    if located.implementation not in ("sdpa", "eager"):
        raise UnsupportedError(
            f"{located.implementation!r} attention cannot decode on a static cache whose layers differ "
            "in length; use attn_implementation='sdpa'"
        )


def _refuse_layers(layers: Sequence[Any], depth: int) -> None:
    if len(layers) != depth or any(type(layer) is not StaticLayer for layer in layers):
        raise UnsupportedError(
            "static caches of models with sliding (or linear) layers cannot be pruned; use the default "
            "cache"
        )
