"""Attention for training: plain matrix products, several times faster than SDPA in bf16 on CPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

PLAIN = "autoprune_tiny_plain"
PREFIXED = "autoprune_tiny_prefixed"


def plain_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: object,
) -> tuple[Tensor, None]:
    """Softmax attention of query [batch, heads, q, dim] over key and value [batch, heads, k, dim].

    `attention_mask` is additive, [batch, 1, q, k] or None. Keys with fewer heads are shared.
    """
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key = key.repeat_interleave(groups, dim=1)
        value = value.repeat_interleave(groups, dim=1)
    scores = (query * scaling) @ key.transpose(-1, -2)
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = torch.softmax(scores, dim=-1).to(value.dtype)
    return (weights @ value).transpose(1, 2).contiguous(), None


AttentionInterface.register(PLAIN, plain_attention)


@contextmanager
def use_attention(model: PreTrainedModel, name: str) -> Iterator[None]:
    """Run a model with the attention function registered as `name` inside the block."""
    before = model.config._attn_implementation
    model.config._attn_implementation = name
    try:
        yield
    finally:
        model.config._attn_implementation = before


def prefixed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    layout: tuple[int, tuple[tuple[int, int], ...]],
    dropout: float = 0.0,
    **kwargs: object,
) -> tuple[Tensor, None]:
    """Causal attention where independent blocks of text each continue the same prefix.

    `layout` is (prefix length, ((blocks, tokens per block), ...)): the sequence is the prefix,
    then all blocks end to end. A token sees the prefix and what precedes it in its own block, so
    the result is that of one sequence per block without computing the prefix again.
    """
    groups = query.shape[1] // key.shape[1]
    key = key.repeat_interleave(groups, dim=1)
    value = value.repeat_interleave(groups, dim=1)
    query = query * scaling
    prefix, shapes = layout
    key_prefix, value_prefix = key[:, :, :prefix].transpose(-1, -2), value[:, :, :prefix]
    scores = query[:, :, :prefix] @ key_prefix + _causal(prefix, query)
    outputs = [torch.softmax(scores, dim=-1).to(value.dtype) @ value_prefix]
    start = prefix
    for blocks, length in shapes:
        stop = start + blocks * length
        rows = query[:, :, start:stop]
        inner = (*query.shape[:2], blocks, length)
        own = rows.unflatten(2, (blocks, length)) @ key[:, :, start:stop].unflatten(
            2, (blocks, length)
        ).transpose(-1, -2)
        scores = torch.cat(
            [(rows @ key_prefix).view(*inner, prefix), own + _causal(length, query)], dim=-1
        )
        weights = torch.softmax(scores, dim=-1).to(value.dtype)
        seen = weights[..., prefix:] @ value[:, :, start:stop].unflatten(2, (blocks, length))
        shared = weights[..., :prefix].flatten(2, 3) @ value_prefix
        outputs.append(shared + seen.flatten(2, 3))
        start = stop
    return torch.cat(outputs, dim=2).transpose(1, 2).contiguous(), None


def _causal(length: int, like: Tensor) -> Tensor:
    ones = torch.ones(length, length, dtype=torch.bool, device=like.device).triu(1)
    return torch.zeros(length, length, dtype=like.dtype, device=like.device).masked_fill(ones, -1e4)


AttentionInterface.register(PREFIXED, prefixed_attention)
