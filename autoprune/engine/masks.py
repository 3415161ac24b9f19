"""Attention masks for shortened sequences: gathered at prefill, built at decoding.

A mask is one of what transformers hands to a decoder layer: None (causal, nothing padded), a 4-D bool or
additive tensor, or for flash attention the 2-D tensor of real tokens.
"""

from __future__ import annotations

import torch
from torch.nn.functional import pad

from .layout import Tokens


def blocked_value(mask: torch.Tensor) -> bool | float:
    """What "must not attend" is in a mask of this type."""
    return False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min


def gather_mask(mask: torch.Tensor, tokens: Tokens, key_length: int) -> torch.Tensor:
    """The model's own prefill mask, rows and columns of the remaining tokens only.

    Keeps whatever pattern the model has (sliding windows, bidirectional prefixes). Padding rows see only
    themselves, so that no row of the softmax is empty.

    Args:
        mask: [batch or 1, 1 or heads, S, keys].
        tokens: the remaining tokens.
        key_length: keys the attention will be given; more than there are tokens for a static cache.
    """
    batch, width = tokens.column.shape
    mask = mask.expand(batch, -1, -1, -1)
    column = tokens.column.clamp(min=0)
    rows = column[:, None, :, None].expand(-1, mask.shape[1], -1, mask.shape[3])
    mask = mask.gather(2, rows)
    columns = column[:, None, None, :].expand(-1, mask.shape[1], width, -1)
    mask = mask.gather(3, columns)
    return _finish(mask, tokens, key_length)


def causal_mask(tokens: Tokens, like: torch.Tensor | None, key_length: int) -> torch.Tensor:
    """A causal mask over the remaining tokens in their order; bool, or additive like `like`."""
    batch, width = tokens.column.shape
    device = tokens.column.device
    order = torch.arange(width, device=device)
    allowed = (order[None, :] <= order[:, None])[None, None].expand(batch, -1, -1, -1)
    return _finish(as_mask(allowed, like), tokens, key_length)


def as_mask(allowed: torch.Tensor, like: torch.Tensor | None) -> torch.Tensor:
    """A bool tensor of allowed pairs in the form the attention backend takes."""
    if like is None or like.dtype == torch.bool:
        return allowed
    zero = torch.zeros((), dtype=like.dtype, device=allowed.device)
    return torch.where(allowed, zero, torch.finfo(like.dtype).min)


def _finish(mask: torch.Tensor, tokens: Tokens, key_length: int) -> torch.Tensor:
    blocked = blocked_value(mask)
    if tokens.padded:
        is_padding = tokens.column < 0
        mask = mask.masked_fill(is_padding[:, None, None, :], blocked)
        itself = torch.eye(tokens.width, dtype=torch.bool, device=mask.device)
        open_value = True if mask.dtype == torch.bool else 0.0
        mask = mask.masked_fill(is_padding[:, None, :, None] & itself, open_value)
    if key_length > tokens.width:
        mask = pad(mask, (0, key_length - tokens.width), value=blocked)
    return mask


def decode_mask(
    column: torch.Tensor,
    query_column: torch.Tensor,
    window: int | None,
    valid: torch.Tensor | None,
    key_length: int,
) -> torch.Tensor:
    """bool [batch, 1, queries, keys]: which cached tokens new tokens may see.

    Args:
        column: [batch, keys], original columns of the cached and new tokens, -1 for padding.
        query_column: [queries], columns of the new tokens.
        window: sliding window in original positions, or None.
        valid: bool [batch, columns], the caller's own 2-D mask over all columns so far, or None.
        key_length: keys the attention will be given.
    """
    keys = column[:, None, :]
    allowed = (keys >= 0) & (keys <= query_column[None, :, None])
    if window is not None:
        allowed = allowed & (keys > query_column[None, :, None] - window)
    if valid is not None:
        allowed = allowed & valid.gather(1, column.clamp(min=0))[:, None, :]
    allowed = allowed[:, None]
    if key_length > column.shape[1]:
        allowed = pad(allowed, (0, key_length - column.shape[1]), value=False)
    return allowed
