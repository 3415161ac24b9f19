"""Ragged batches without padding: one row of all prompts' tokens for everything but attention.

Prompts of a batch follow different curves. Padding every layer to the longest prompt would spend on
padding what adaptivity saved, so the layers run on the real tokens of all prompts, joined in one row
[1, total, ...]; attention alone sees them padded, [batch, n, ...]. `benchmarks/ragged_batches.py` measures
packing against padding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers.cache_utils import DynamicCache, DynamicLayer

from ...parts.transfer import all_to_device

# Below this share of padding the copies around attention cost more than the padding they save.
WORTH_PACKING = 0.04


class Packing:
    """Where the tokens of a padded batch are in the packed row, and back.

    Args:
        place: LongTensor [batch, n], each token's place in the row; for padding that of its prompt's first
            one, so that what is not finite in one prompt reaches no other.
        slots: LongTensor [total], the places of the row's tokens among the batch * n padded ones.
    """

    def __init__(self, place: torch.Tensor, slots: torch.Tensor):
        self.place, self.slots = place, slots

    @classmethod
    def of(cls, lengths: Sequence[int], width: int, device: torch.device) -> Packing:
        """Of prompts of these lengths, padded on the left to `width`."""
        number = np.array(lengths)[:, None]
        first, place = number.cumsum(axis=0) - number, np.arange(width) - (width - number)
        row = np.minimum(first + np.maximum(place, 0), max(int(number.sum()) - 1, 0))
        return cls(*all_to_device([row, np.flatnonzero(place >= 0)], device))

    def pack(self, padded: torch.Tensor, dim: int = 0) -> torch.Tensor:
        """[..., batch, n, ...], the batch in dimension `dim`, -> [..., 1, total, ...]."""
        rows = padded.flatten(dim, dim + 1)
        return rows.index_select(dim, self.slots.to(padded.device)).unsqueeze(dim)

    def unpack(self, packed: torch.Tensor) -> torch.Tensor:
        """[1, total, ...] -> [batch, n, ...]; padding holds some other token."""
        rows = packed.index_select(1, self.place.flatten().to(packed.device))
        return rows.view(*self.place.shape, *packed.shape[2:])

    def unpack_heads(self, packed: torch.Tensor) -> torch.Tensor:
        """[1, heads, total, head dim] -> [batch, heads, n, head dim]; of what a cache holds, too."""
        return self.unpack(packed.transpose(1, 2)).transpose(1, 2)


def watches_inputs(layers: Sequence[nn.Module]) -> bool:
    """Whether a part of a layer has a forward pre-hook, which may count on the batch in the input, as PEFT's
    do where the prompts of a batch have adapters of their own.
    """
    parts = (part for layer in layers for part in layer.modules() if part is not layer)
    return any(part._forward_pre_hooks for part in parts)


def can_pack(cache: Any, implementation: str, has_windows: bool) -> bool:
    """Whether what a packed row leaves in a cache can be put into its own form after the layer's update.

    Args:
        cache: None, or the cache of the prefill.
        implementation: the attention backend; flash attention packs by itself.
        has_windows: whether a layer forgets what is behind a sliding window.
    """
    if has_windows or implementation not in ("sdpa", "eager"):
        return False
    if cache is None:
        return True
    plain = type(cache) is DynamicCache and not getattr(cache, "offloading", False)
    return plain and all(type(layer) is DynamicLayer for layer in cache.layers)
