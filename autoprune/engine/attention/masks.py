"""Attention masks for shortened sequences: gathered at prefill, built at decoding.

A mask is one of what transformers hands to a decoder layer: None (causal, nothing padded), a 4-D bool or
additive tensor, the 2-D tensor of real tokens for flash attention, or the BlockMask of flex attention.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from torch.nn.functional import pad

from ..locate import Window
from ..tokens.present import Tokens, blocked_by_half


def blocked_value(mask: torch.Tensor) -> bool | float:
    """What "must not attend" is in a mask of this type."""
    return False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min


def gather_mask(mask: torch.Tensor, tokens: Tokens, key_length: int) -> torch.Tensor:
    """The model's own prefill mask, rows and columns of the remaining tokens only.

    Keeps whatever pattern the model has (sliding windows, bidirectional prefixes). A merged token stands
    behind the one whose column it has, and is not seen by it. Padding rows see only themselves, so that no
    row of the softmax is empty.

    Args:
        mask: [batch or 1, 1 or heads, S, keys].
        tokens: the remaining tokens.
        key_length: keys the attention will be given; more than there are tokens for a static cache.
    """
    batch, width = tokens.column.shape
    mask = mask.expand(batch, -1, -1, -1)
    column = tokens.some_column
    rows = column[:, None, :, None].expand(-1, mask.shape[1], -1, mask.shape[3])
    mask = mask.gather(2, rows)
    columns = column[:, None, None, :].expand(-1, mask.shape[1], width, -1)
    mask = mask.gather(3, columns)
    if tokens.has_new:
        later = (column[:, None] == column[..., None]).triu(1)
        mask = mask.masked_fill(later[:, None], blocked_value(mask))
    return _finish(mask, tokens, key_length)


def gather_block_mask(mask: BlockMask, tokens: Tokens, key_length: int) -> BlockMask:
    """The model's own flex-attention mask, asked about the columns of the remaining tokens."""
    batch, width = tokens.column.shape
    real, column, old = tokens.column >= 0, tokens.some_column, mask.mask_mod

    def kept_only(
        b: torch.Tensor, h: torch.Tensor, query: torch.Tensor, key: torch.Tensor
    ) -> torch.Tensor:
        inside = key < width
        key = key.clamp(max=width - 1)
        seen = old(b, h, column[b, query], column[b, key]) & real[b, key] & inside
        if tokens.has_new:
            seen = seen & ((key <= query) | (column[b, query] != column[b, key]))
        return seen | (~real[b, query] & (query == key))

    return create_block_mask(kept_only, batch, None, width, key_length, device=column.device)


class CausalMasks:
    """Masks of tokens that see those before them, for all depths of a prefill; made from one triangle.

    They are additive, as attention would turn a bool mask into one in every layer.
    """

    def __init__(self) -> None:
        self._triangle: torch.Tensor | None = None

    def of(self, tokens: Tokens, key_length: int, dtype: torch.dtype) -> torch.Tensor:
        """[batch or 1, 1, n, keys], for what a cut left: padding on the left, tokens weighed by their sizes."""
        blocked, width = blocked_by_half(dtype), tokens.width
        device = tokens.column.device
        if self._triangle is None or self._triangle.shape[0] < width:
            full = torch.full((width, width), blocked, dtype=dtype, device=device)
            self._triangle = full.triu_(1)
        mask = self._triangle[None, None, :width, :width]
        # Kernels read masks whose rows begin at multiples of 8 as they are.
        columns = tokens.bias
        if tokens.padded:
            padding = tokens.padding_mask(dtype)
            columns = padding if columns is None else padding + columns
        if columns is not None:
            shape = len(columns), 1, width, -(-key_length // 8) * 8
            out = mask.new_empty(shape)[..., :width]
            mask = torch.add(mask, columns[:, None, None], out=out)
        if key_length > width:
            mask = pad(mask, (0, key_length - width), value=blocked)
        return mask


def weighed(mask: Any, tokens: Tokens, key_length: int, dtype: torch.dtype) -> torch.Tensor:
    """A mask over the present tokens, additive and with what is added for their sizes (`Tokens.bias`).

    Args:
        mask: a 4-D or flex-attention mask.
        key_length: keys the attention will be given.

    Returns:
        [batch or 1, 1 or heads, n, keys].
    """
    assert tokens.bias is not None
    if isinstance(mask, BlockMask):
        mask = additive(_allowed(mask, tokens, key_length), dtype)
    elif mask.dtype == torch.bool:
        mask = additive(mask, dtype)
    bias = pad(tokens.bias.to(mask), (0, key_length - tokens.width))
    return mask + bias[:, None, None]


def _allowed(mask: BlockMask, tokens: Tokens, key_length: int) -> torch.Tensor:
    """A flex-attention mask as bool [batch, 1, n, keys]."""
    device = tokens.column.device
    batch = torch.arange(tokens.batch, device=device)[:, None, None]
    query = torch.arange(tokens.width, device=device)[None, :, None]
    key = torch.arange(key_length, device=device)[None, None]
    return mask.mask_mod(batch, torch.zeros_like(batch), query, key)[:, None]


def row_mask(
    mask: Any, tokens: Tokens, slots: torch.Tensor | slice
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """What a few query rows may not see of the present tokens: `blocked` and `bias` of `row_attention`.

    Args:
        mask: the layer's mask over the present tokens.
        slots: places of the rows in the present sequence, [batch, rows] or the same for all prompts.

    Returns:
        bool [batch or 1, 1, rows, the last of the n] and None, or None and an additive mask
        [batch or 1, 1, rows, n].
    """
    width = tokens.width
    if isinstance(mask, torch.Tensor) and mask.ndim == 4:
        rows = mask[..., :width]
        if isinstance(slots, slice):
            rows = rows[:, :, slots]
        else:
            rows = rows.expand(slots.shape[0], -1, -1, -1)
            index = slots.to(rows.device)[:, None, :, None]
            rows = rows.gather(2, index.expand(-1, rows.shape[1], -1, width))
        return (~rows, None) if rows.dtype == torch.bool else (None, _as_float(rows))
    first, device = 0, tokens.column.device
    if isinstance(slots, slice):
        # Where the mask is causal and the rows are the last, the keys before them are seen by all.
        first = slots.start if rows_are_causal(mask, tokens, slots) else 0
        order = torch.arange(first, width, device=device)
        query = order[None, slots.start - first : slots.stop - first]
    else:
        order, query = torch.arange(width, device=device), slots
    if isinstance(mask, BlockMask):
        batch = torch.arange(len(tokens.column), device=order.device)[:, None, None]
        head = torch.zeros_like(batch)
        allowed = mask.mask_mod(batch, head, query[:, :, None], order[None, None, :])
        return ~allowed[:, None], None
    blocked = order > query[:, :, None]
    if tokens.padded:
        blocked = blocked | (tokens.column < 0)[:, None, :]
    return blocked[:, None], None


def _as_float(bias: torch.Tensor) -> torch.Tensor:
    """An additive mask in float32; what is least in float64 stays finite."""
    if bias.dtype == torch.float64:
        bias = bias.clamp(min=torch.finfo(torch.float32).min)
    return bias.float()


def rows_are_causal(mask: Any, tokens: Tokens, slots: torch.Tensor | slice) -> bool:
    """Whether rows at the end see every token before them, and no more than that follows from their places."""
    return isinstance(slots, slice) and not has_pattern(mask) and not tokens.padded


def has_pattern(mask: Any) -> bool:
    """Whether a mask says of each pair of tokens whether one sees the other."""
    return isinstance(mask, BlockMask) or (isinstance(mask, torch.Tensor) and mask.ndim == 4)


def as_mask(allowed: torch.Tensor, like: Any) -> Any:
    """A bool tensor of allowed pairs [batch, 1, queries, keys], in the form of the mask `like`."""
    if isinstance(like, BlockMask):
        return create_block_mask(
            lambda b, h, query, key: allowed[b, 0, query, key],
            allowed.shape[0], None, allowed.shape[2], allowed.shape[3], device=allowed.device,
        )  # fmt: skip
    if not isinstance(like, torch.Tensor) or like.dtype == torch.bool:
        return allowed
    return additive(allowed, like.dtype)


def additive(allowed: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A bool mask as one that is added to the scores."""
    zero = torch.zeros((), dtype=dtype, device=allowed.device)
    return torch.where(allowed, zero, torch.finfo(dtype).min)


def biased(allowed: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """A bool mask [batch, 1, queries, keys] as an additive one, with `bias` [batch, keys] for all queries."""
    mask = additive(allowed, dtype)
    return mask if bias is None else mask + bias[:, None, None].to(mask)


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
    window: Window | None,
    valid: torch.Tensor | None,
    first: torch.Tensor | None,
) -> torch.Tensor:
    """bool [batch, 1, queries, keys]: which cached tokens new tokens may see.

    Args:
        column: [batch, keys], original columns of the cached and new tokens, -1 for padding.
        query_column: [queries], columns of the new tokens.
        window: what the layer sees, in original positions, or None for all.
        valid: bool [batch, columns], the caller's own 2-D mask over all columns so far, or None.
        first: LongTensor [batch], the column of each prompt's first token, from which chunks are counted; None
            without any.
    """
    keys, queries = column[:, None, :], query_column[None, :, None]
    allowed = (keys >= 0) & (keys <= queries)
    if window is not None and window.chunked:
        assert first is not None
        start = first.to(column.device)[:, None, None]
        allowed = allowed & ((keys - start) // window.size == (queries - start) // window.size)
    elif window is not None:
        allowed = allowed & (keys > queries - window.size)
    if valid is not None:
        allowed = allowed & valid.gather(1, column.clamp(min=0))[:, None, :]
    return allowed[:, None]


def shown_columns(mask: Any, batch: int) -> torch.Tensor | None:
    """What a caller's mask lets the last new token see, bool [batch, columns]; None if there is none.

    `generate` makes a 4-D mask for static caches, and some families one for each type of layer.
    """
    if isinstance(mask, dict):
        mask = mask.get("full_attention")
    if not isinstance(mask, torch.Tensor):
        return None
    if mask.ndim == 4:
        mask = mask[:, 0, -1]
        mask = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    return mask.bool().expand(batch, -1)
