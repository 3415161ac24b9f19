"""Ragged batches without padding: one row of all prompts' tokens for everything but attention.

Prompts of a batch follow different curves. Padding every layer to the longest prompt would spend on
padding what adaptivity saved, so the layers run on the real tokens of all prompts, joined in one row
[1, total, ...]; attention alone sees them padded, [batch, n, ...]. `benchmarks/ragged_batches.py` measures
packing against padding.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer

# Below this share of padding the copies around attention cost more than the padding they save.
WORTH_PACKING = 0.04


class Packing:
    """Where the tokens of a padded batch are in the packed row, and back.

    real: bool [batch, n], False for padding.
    place: LongTensor [batch, n], place of each token in the row; 0 for padding.
    slots: LongTensor [total], places of the row's tokens among the batch * n padded ones.
    """

    def __init__(self, real: torch.Tensor, total: int):
        self.real = real
        place = real.flatten().cumsum(0) - 1
        self.place = place.clamp(min=0).view(real.shape)
        # Of equal keys a stable sort keeps the order; unlike nonzero it needs no count from the device.
        self.slots = (~real.flatten()).to(torch.int8).argsort(stable=True)[:total]

    def pack(self, padded: torch.Tensor, dim: int = 0) -> torch.Tensor:
        """[..., batch, n, ...], the batch in dimension `dim`, -> [..., 1, total, ...]."""
        rows = padded.flatten(dim, dim + 1)
        return rows.index_select(dim, self.slots.to(padded.device)).unsqueeze(dim)

    def unpack(self, packed: torch.Tensor) -> torch.Tensor:
        """[1, total, ...] -> [batch, n, ...]; padding holds the first token."""
        place = self.place.to(packed.device)
        return packed[0].index_select(0, place.flatten()).unflatten(0, place.shape)

    def unpack_heads(self, packed: torch.Tensor) -> torch.Tensor:
        """[1, heads, total, head dim] -> [batch, heads, n, head dim]."""
        return self.unpack(packed.transpose(1, 2)).transpose(1, 2)


def can_pack(cache: Any, implementation: str, has_windows: bool) -> bool:
    """Whether keys of a packed row can be put back into a cache's own form after the layer's update.

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
