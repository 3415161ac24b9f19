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
    width = scores.shape[1]
    largest = max(counts, default=0)
    scores = scores.masked_fill(~mask, float("-inf"))
    best = scores.sort(dim=1, descending=True, stable=True).indices[:, :largest]
    if min(counts, default=0) == largest:
        return best.sort(dim=1).values
    rank = torch.arange(largest, device=scores.device)
    keep = torch.as_tensor(list(counts)).to(scores.device)
    kept = best.masked_fill(rank >= keep[:, None], width).sort(dim=1).values
    return kept.masked_fill(kept == width, -1)
