"""From scores to kept positions, for ragged batches."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def top_k(scores: torch.Tensor, counts: Sequence[int], mask: torch.Tensor) -> torch.Tensor:
    """The best-scored tokens of each prompt, in their original order.

    Ties go to the lower position, so the result does not depend on the device or the batch.

    Args:
        scores: float [batch, V].
        counts: how many tokens to keep of each prompt.
        mask: bool [batch, V], False for padding.

    Returns:
        LongTensor [batch, max(counts)], ascending positions, -1 where a prompt keeps fewer.
    """
    scores = scores.masked_fill(~mask, float("-inf"))
    best = scores.sort(dim=1, descending=True, stable=True).indices
    return first_picks(best, counts, scores.shape[1])


def first_picks(order: torch.Tensor, counts: Sequence[int], width: int) -> torch.Tensor:
    """The first `counts[b]` positions of each prompt's ranking, ascending.

    Args:
        order: LongTensor [batch, at least max(counts)], positions, best first.
        counts: how many tokens to keep of each prompt.
        width: V, above every position.

    Returns:
        LongTensor [batch, max(counts)], -1 where a prompt keeps fewer.
    """
    largest = max(counts, default=0)
    best = order[:, :largest]
    if min(counts, default=0) == largest:
        return best.sort(dim=1).values
    rank = torch.arange(largest, device=order.device)
    keep = torch.as_tensor(list(counts)).to(order.device)
    kept = best.masked_fill(rank >= keep[:, None], width).sort(dim=1).values
    return kept.masked_fill(kept == width, -1)
