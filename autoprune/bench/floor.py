"""The decoder on as many tokens as pruning leaves in each layer, without the library: the best that this
machine can make of shorter layers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from ..engine.attention.masks import BlockMask, as_mask
from ..trace import Sample


@dataclass(frozen=True)
class LayersAlone:
    """Called with a model as a method is; then each layer gets the last tokens of what it is given.

    The model computes something else than pruned, on tensors of the same sizes.

    Args:
        lengths: tokens of each layer, text included; none may exceed the one before.
    """

    lengths: tuple[int, ...]

    @classmethod
    def like(cls, samples: Sequence[Sample]) -> LayersAlone:
        """As many tokens as a batch had in every layer, its prompts alike."""
        counts = np.array([[n + s.num_text for n in s.tokens_per_layer] for s in samples])
        return cls(tuple(int(n) for n in np.ceil(counts.mean(axis=0))))

    @contextmanager
    def __call__(self, model: Any) -> Iterator[None]:
        decoder = model.get_decoder()
        handles = [decoder.register_forward_pre_hook(_without_deepstack, with_kwargs=True)]
        handles += [
            layer.register_forward_pre_hook(partial(_shorten, length), with_kwargs=True)
            for layer, length in zip(decoder.layers, self.lengths, strict=True)
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _without_deepstack(module: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict]:
    """Features for deeper layers are of the whole prompt's length."""
    if "deepstack_visual_embeds" not in kwargs:
        return args, kwargs
    return args, {**kwargs, "deepstack_visual_embeds": None, "visual_pos_masks": None}


def _shorten(length: int, module: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict]:
    hidden, kwargs = args[0][:, -length:].contiguous(), dict(kwargs)
    if (embeddings := kwargs.get("position_embeddings")) is not None:
        kwargs["position_embeddings"] = tuple(part[..., -length:, :] for part in embeddings)
    if (ids := kwargs.get("position_ids")) is not None:
        kwargs["position_ids"] = ids[..., -length:]
    mask = kwargs.get("attention_mask")
    if isinstance(mask, BlockMask):
        causal = torch.ones(length, length, dtype=torch.bool, device=hidden.device).tril()
        kwargs["attention_mask"] = as_mask(causal.expand(len(hidden), 1, -1, -1), mask)
    elif mask is not None:
        # [batch, 1, queries, keys], or [batch, keys] for flash attention.
        kwargs["attention_mask"] = (
            mask[..., -length:] if mask.ndim == 2 else mask[..., -length:, -length:]
        )
    return (hidden, *args[1:]), kwargs
