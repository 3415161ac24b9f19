"""Softmax attention of a few query rows, as methods see it: what kernels compute and do not show."""

from __future__ import annotations

import torch


def row_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    scaling: float | None,
    blocked: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    softcap: float | None = None,
) -> torch.Tensor:
    """Softmax attention of a few query rows over all keys, in float32.

    Args:
        query: [batch, heads, rows, head dim], rotated.
        key: [batch, key heads, keys, head dim], rotated; heads is a multiple of key heads.
        scaling: factor on the scores; None is 1 / sqrt(head dim).
        blocked: bool [batch or 1, 1, rows, m], True where a row must not look, for the last m keys.
        bias: additive mask [batch or 1, 1, rows, keys].
        softcap: logit cap of Gemma 2.

    Returns:
        [batch, heads, rows, keys].
    """
    batch, heads, rows, width = query.shape
    # Heads that share a key head are rows of one product.
    query = query.reshape(batch * key.shape[1], -1, width)
    key = key.flatten(0, 1).transpose(1, 2)
    scores = torch.baddbmm(query.new_empty(()), query, key, beta=0, alpha=scaling or width**-0.5)
    scores = scores.view(batch, heads, rows, -1)
    if softcap is not None or bias is not None or scores.dtype == torch.float64:
        # The softmax would turn what is least in float64 into an infinity.
        scores = scores.float()
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if blocked is not None:
        last = scores[..., scores.shape[-1] - blocked.shape[-1] :]
        last.masked_fill_(blocked, torch.finfo(scores.dtype).min)
    if bias is not None:
        scores = scores + bias
    return scores.softmax(dim=-1, dtype=torch.float32)
