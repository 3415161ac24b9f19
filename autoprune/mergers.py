"""What becomes of dropped visual tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from .method import Merged, Observation, Selection
from .reference_math import cluster_and_merge, cluster_count, recycled_count
from .selectors import top_k

Merger = Callable[[Observation, torch.Tensor, Sequence[int]], Selection]


def recycle(
    seen: Observation,
    scores: torch.Tensor,
    counts: Sequence[int],
    recycled: Sequence[int],
    clusters: Sequence[int],
    behind: bool = False,
) -> Selection:
    """Keep the best tokens, and merge the best of the dropped ones into cluster means (DPC-KNN).

    The recycling of SparseVLM (ICML 2025) and of the released AutoPrune.

    Args:
        scores: [batch, V].
        counts: tokens kept of each prompt.
        recycled: dropped tokens of each prompt, best first, that are clustered; the rest is lost.
        clusters: merged tokens that come out of them.
        behind: put merged tokens behind all others, rather than where their cluster's centre was.
    """
    kept = top_k(scores, counts, seen.mask)
    assert seen.hidden is not None
    hidden = seen.hidden()
    order = scores.masked_fill(~seen.mask, float("-inf")).argsort(
        dim=1, descending=True, stable=True
    )
    width = max(clusters)
    merged = hidden.new_zeros(len(counts), width, hidden.shape[2])
    place = torch.zeros(len(counts), width, dtype=torch.long, device=hidden.device)
    for prompt, (count, m, k) in enumerate(zip(counts, recycled, clusters, strict=True)):
        if not k:
            continue
        candidates = order[prompt, count : count + m].to(hidden.device)
        centers, _, means = cluster_and_merge(hidden[prompt, candidates].float(), k)
        merged[prompt, :k] = means.to(hidden.dtype)
        place[prompt, :k] = candidates[centers]
    return Selection(
        kept,
        list(counts),
        Merged(merged, list(clusters), None if behind else place.to(seen.mask.device)),
    )


def dpc_knn(seen: Observation, scores: torch.Tensor, counts: Sequence[int]) -> Selection:
    """Recycle inside the budget: kept and merged tokens together are `counts`.

    30 % of the dropped tokens are clustered, ten to a cluster, as in SparseVLM.
    """
    kept, recycled, clusters = [], [], []
    for present, target in zip(seen.counts, counts, strict=True):
        k = 0
        if present > target:
            # More clusters mean fewer kept, hence more dropped tokens; the count settles in a few steps.
            while (
                settled := cluster_count(recycled_count(present - target + k))
            ) > k and k < target - 1:
                k = min(settled, target - 1)
        kept.append(target - k)
        recycled.append(recycled_count(present - target + k) if k else 0)
        clusters.append(k)
    return recycle(seen, scores, kept, recycled, clusters)


MERGERS: dict[str, Merger] = {"dpc_knn": dpc_knn}


def get_merger(name: str | None) -> Merger:
    """The merger of that name; None discards.

    Raises:
        ValueError: there is no such merger.
    """
    if name is None:
        return _discard
    if name not in MERGERS:
        raise ValueError(f"merger must be None or one of {', '.join(MERGERS)}, got {name!r}")
    return MERGERS[name]


def _discard(seen: Observation, scores: torch.Tensor, counts: Sequence[int]) -> Selection:
    return Selection(top_k(scores, counts, seen.mask), list(counts))
