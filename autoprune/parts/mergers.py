"""What becomes of dropped visual tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..contract import Merged, Observation, Selection, SummaryToken
from ..policy.released import cluster_and_merge, cluster_count, recycled_count
from .gather import tokens_at
from .scorers import cosine
from .selectors import ranks, required_first, top_k
from .transfer import to_device

Merger = Callable[[Observation, torch.Tensor, Sequence[int]], Selection]


def recycle(
    seen: Observation,
    scores: torch.Tensor,
    counts: Sequence[int],
    recycled: Sequence[int],
    clusters: Sequence[int],
    behind: bool = False,
    proportional: bool = False,
) -> Selection:
    """Keep the best tokens, and merge the best of the dropped ones into cluster means (DPC-KNN).

    The recycling of SparseVLM (ICML 2025) and of the released AutoPrune.

    Args:
        scores: [batch, V].
        counts: tokens kept of each prompt.
        recycled: dropped tokens of each prompt, best first, that are clustered; the rest is lost.
        clusters: merged tokens that come out of them.
        behind: put merged tokens behind all others, rather than where their cluster's centre was.
        proportional: a merged token counts in attention for as many as it is made of.
    """
    scores = required_first(scores, seen)
    kept = top_k(scores, counts, seen.mask)
    assert seen.hidden is not None
    hidden = seen.hidden()
    order = scores.masked_fill(~seen.mask, float("-inf")).argsort(
        dim=1, descending=True, stable=True
    )
    width = max(clusters)
    merged = hidden.new_zeros(len(counts), width, hidden.shape[2])
    place = torch.zeros(len(counts), width, dtype=torch.long, device=hidden.device)
    sizes = torch.ones(len(counts), width, device=hidden.device)
    for prompt, (count, m, k) in enumerate(zip(counts, recycled, clusters, strict=True)):
        if not k:
            continue
        candidates = order[prompt, count : count + m].to(hidden.device)
        centers, cluster, means = cluster_and_merge(hidden[prompt, candidates].float(), k)
        sizes[prompt, :k] = torch.zeros_like(sizes[prompt, :k]).index_add_(
            0, cluster, torch.ones_like(cluster, dtype=sizes.dtype)
        )
        merged[prompt, :k] = means.to(hidden.dtype)
        place[prompt, :k] = candidates[centers]
    where = None if behind else place.to(seen.mask.device)
    weighed = sizes.to(seen.mask.device) if proportional else None
    return Selection(kept, list(counts), Merged(merged, list(clusters), where, weighed))


def dpc_knn(
    seen: Observation, scores: torch.Tensor, counts: Sequence[int], proportional: bool = False
) -> Selection:
    """Recycle inside the budget: kept and merged tokens together are `counts`.

    30 % of the dropped tokens are clustered, ten to a cluster, as in SparseVLM.

    Args:
        proportional: as for `recycle`.
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
    return recycle(seen, scores, kept, recycled, clusters, proportional=proportional)


MERGERS: dict[str, Merger] = {"dpc_knn": dpc_knn}
"""Those that make tokens of dropped ones, by name."""


def as_summary(merger: Any, others: Sequence[str] = ()) -> SummaryToken | None:
    """The summary that a `merger` option asks for, as text or as it is; None for other mergers.

    Args:
        others: the other mergers that this option takes.

    Raises:
        ValueError: it is none of these.
    """
    if merger is None or isinstance(merger, SummaryToken):
        return merger
    if isinstance(merger, str) and merger.startswith("summary"):
        return SummaryToken.of(merger)
    if not isinstance(merger, str) or merger not in others:
        named = ", ".join(["None", *others])
        raise ValueError(f"merger must be {named}, summary or a SummaryToken, got {merger!r}")
    return None


def discard(seen: Observation, scores: torch.Tensor, counts: Sequence[int]) -> Selection:
    """Keep the best tokens, and lose the others."""
    mask = seen.mask if seen.ragged else None
    return Selection(top_k(required_first(scores, seen), counts, mask), list(counts))


def absorb(hidden: torch.Tensor, kept: torch.Tensor, owner: torch.Tensor) -> torch.Tensor:
    """Make every kept token the mean of itself and of the dropped tokens that it owns.

    Args:
        hidden: [batch, V, size].
        kept: LongTensor [batch, K], positions; -1 is padding.
        owner: LongTensor [batch, V], position of the kept token that takes each one in; -1 where no
            other does.

    Returns:
        [batch, K, size], for `Selection.states`. A token that owns no other is bit for bit the same.
    """
    kept, owner = kept.to(hidden.device), owner.to(hidden.device)
    itself = torch.arange(owner.shape[1], device=owner.device)
    owner = torch.where(owner < 0, itself, owner)
    total = torch.zeros_like(hidden, dtype=torch.float32)
    total.scatter_add_(1, owner[..., None].expand_as(hidden), hidden.float())
    size = torch.zeros(owner.shape, device=hidden.device)
    size.scatter_add_(1, owner, torch.ones_like(size))
    means = (total / size.clamp(min=1)[..., None]).to(hidden.dtype)
    return tokens_at(means, kept.clamp(min=0))


def owned(kept: torch.Tensor, owner: torch.Tensor) -> torch.Tensor:
    """Of how many tokens `absorb` makes each kept one, float32 [batch, K], for `Selection.sizes`.

    Args:
        kept, owner: as there.
    """
    kept = kept.to(owner.device)
    itself = torch.arange(owner.shape[1], device=owner.device)
    size = torch.zeros(owner.shape, device=owner.device)
    size.scatter_add_(1, torch.where(owner < 0, itself, owner), torch.ones_like(size))
    return size.gather(1, kept.clamp(min=0)).clamp(min=1)


def in_order(states: torch.Tensor, kept: torch.Tensor, rank: torch.Tensor) -> torch.Tensor:
    """The kept tokens' states by rising rank instead of by place, to be handed to the kept places in turn.

    With compacted positions that is the same as to hand the tokens over in this order.

    Args:
        states: [batch, K, size].
        kept: LongTensor [batch, K], positions; -1 is padding.
        rank: [batch, V]; of equal ones the lower position comes first.
    """
    rank = rank.float().gather(1, kept.clamp(min=0)).masked_fill(kept < 0, float("inf"))
    order = rank.sort(dim=1, stable=True).indices.to(states.device)
    return tokens_at(states, order)


def merge_similar(
    features: torch.Tensor,
    pool: torch.Tensor,
    present: Sequence[int],
    counts: Sequence[int],
    rounds: int,
    worth: torch.Tensor | None = None,
    groups: torch.Tensor | None = None,
    has_cls: bool = False,
) -> torch.Tensor:
    """Bipartite soft matching, in rounds: the tokens of a pool become groups of similar ones.

    A round splits what is left into sources, every other token, and targets, the rest, finds for each
    source its most similar target, and joins the most similar pairs there; a group's features are the
    mean of its tokens'. What is to go is spread evenly over the rounds, but no round takes more than half;
    further rounds follow until it is gone. From ToMe (ICLR 2023), where every block is a round.

    Args:
        features: [batch, V, size], compared by cosine.
        pool: bool [batch, V], the tokens that take part.
        present: how many tokens of each prompt there are, in the pool or not.
        counts: groups of each prompt; a smaller pool is left as it is.
        rounds: 1 or more; 1 takes half of what is left each time.
        worth: [batch, V], taken off the similarity with which a token joins another.
        groups: [batch, V], numbers of groups to begin with; without, every token is one.
        has_cls: as for `join_similar`.

    Returns:
        LongTensor [batch, V]: for each token of the pool the position of the one that stands for its
        group (its own, for that one), and -1 outside the pool.
    """
    position = torch.arange(pool.shape[1], device=pool.device).expand(pool.shape)
    owner = position.masked_fill(~pool, -1)
    goal = to_device(list(counts), pool.device)
    total = features.float()
    if worth is not None:
        total = torch.cat([total, worth[..., None]], dim=2)
    total, size = total * pool[..., None], pool.float()
    if groups is not None:
        same = (groups[:, :, None] == groups[:, None]) & pool[:, None]
        # The first of a group stands for it.
        owner = torch.where(pool, same.to(torch.uint8).argmax(dim=2), -1)
        total, size = _add_up(total, size, torch.where(pool, owner, position))
    left, done = list(present), 0
    while any(n > count for n, count in zip(left, counts, strict=True)):
        # The same arithmetic on the host says when every prompt is done, without waiting for the device.
        share, widest = max(rounds - done, 1), max(left)
        left = [n - leaving_in_round(n, c, share) for n, c in zip(left, counts, strict=True)]
        alive = owner == position
        number = alive.sum(dim=1)
        leaving = torch.minimum(-((goal - number) // share), number // 2)
        order = alive.sort(dim=1, descending=True, stable=True).indices[:, :widest]
        means = total / size.clamp(min=1)[..., None]
        means = tokens_at(means, order)
        if worth is None:
            joins = join_similar(means, leaving, number=number, has_cls=has_cls)
        else:
            joins = join_similar(means[..., :-1], leaving, means[..., -1], number, has_cls)
        into = position.scatter(1, order, order.gather(1, joins))
        owner = torch.where(owner < 0, owner, into.gather(1, owner.clamp(min=0)))
        total, size = _add_up(total, size, into)
        done += 1
    return owner


def leaving_in_round(present: int, goal: int, rounds: int) -> int:
    """Tokens that leave now if all above `goal` leave evenly over so many rounds, at most half in each."""
    return max(min(-((goal - present) // rounds), present // 2), 0)


def _add_up(
    total: torch.Tensor, size: torch.Tensor, into: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums [batch, V, size] and sizes [batch, V] of tokens, after each went to `into` [batch, V]."""
    return (
        torch.zeros_like(total).scatter_add(1, into[..., None].expand_as(total), total),
        torch.zeros_like(size).scatter_add(1, into, size),
    )


def join_similar(
    features: torch.Tensor,
    leaving: torch.Tensor,
    worth: torch.Tensor | None = None,
    number: torch.Tensor | None = None,
    has_cls: bool = False,
) -> torch.Tensor:
    """One round of `merge_similar`, with one token for each group; there are two or more.

    Args:
        features, worth: as there.
        leaving: LongTensor [batch], how many tokens join another; at most half.
        number: LongTensor [batch], so many tokens take part, and others stand behind; None for all.
        has_cls: whether a CLS token stood before the first token. It counted as a source that may not
            join any, so the sources are the second token, the fourth, and so on; without it they are the
            first, the third, and so on.

    Returns:
        LongTensor [batch, V]: the position of the token that each one joins, its own if it stays.
    """
    position = torch.arange(features.shape[1], device=features.device).repeat(len(features), 1)
    real = position >= 0 if number is None else position < number[:, None]
    first, second = slice(0, None, 2), slice(1, None, 2)
    source, target = (second, first) if has_cls else (first, second)
    similarity = cosine(features[:, source], features[:, target])
    if number is not None:
        similarity = similarity.masked_fill(~real[:, None, target], float("-inf"))
    best, partner = similarity.max(dim=2)
    if worth is not None:
        best = best - worth[:, source]
    joins = ranks(best, real[:, source]) < leaving[:, None]
    into = position[:, target].gather(1, partner)
    position[:, source] = torch.where(joins, into, position[:, source])
    return position
