"""From scores to kept positions, for ragged batches."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from ..contract import Observation
from .gather import tokens_at
from .scorers import cosine
from .transfer import to_device


def top_k(scores: torch.Tensor, counts: Sequence[int], mask: torch.Tensor | None) -> torch.Tensor:
    """The best-scored tokens of each prompt, in their original order.

    Ties go to the lower position, so the result does not depend on the device or the batch.

    Args:
        scores: float [batch, V].
        counts: how many tokens to keep of each prompt.
        mask: bool [batch, V], False for padding; None if there is none.

    Returns:
        LongTensor [batch, max(counts)], ascending positions, -1 where a prompt keeps fewer.
    """
    if mask is not None:
        scores = scores.where(mask, float("-inf"))
    best = scores.sort(dim=1, descending=True, stable=True).indices
    return first_picks(best, counts, scores.shape[1])


def required_first(scores: torch.Tensor, seen: Observation) -> torch.Tensor:
    """Scores [batch, V] by which no token is better than those that stay anyway (`Observation.required`)."""
    if seen.required is None:
        return scores
    return scores.masked_fill(seen.required.to(scores.device), float("inf"))


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
    beyond = to_device(np.arange(largest) >= np.array(counts)[:, None], order.device)
    return best.masked_fill(beyond, width).sort(dim=1).values.masked_fill_(beyond, -1)


def ranks(scores: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Each token's place in the order of scores, LongTensor [batch, V]: 0 is the best.

    Ties go to the lower position; tokens outside `mask` come last.
    """
    scores = scores.where(mask, float("-inf"))
    return scores.sort(dim=1, descending=True, stable=True).indices.argsort(dim=1)


def top_by_tier(
    tiers: torch.Tensor, scores: torch.Tensor, counts: Sequence[int], mask: torch.Tensor
) -> torch.Tensor:
    """As `top_k`, but every token of a higher tier comes before any of a lower one.

    Args:
        tiers: int or bool [batch, V], 0 or more.
        scores, counts, mask: as for `top_k`; scores decide within a tier.
    """
    best = scores.where(mask, float("-inf")).sort(dim=1, descending=True, stable=True)
    tiers = tiers.long().masked_fill(~mask, -1).gather(1, best.indices)
    order = tiers.sort(dim=1, descending=True, stable=True).indices
    return first_picks(best.indices.gather(1, order), counts, scores.shape[1])


def max_min_diversity(
    features: torch.Tensor, counts: Sequence[int], mask: torch.Tensor
) -> torch.Tensor:
    """Greedy farthest points: each pick is the token whose nearest pick is farthest away.

    The first is the token whose nearest neighbour is farthest. Distance is 1 - cosine.

    Args:
        features: [batch, V, size].
        counts, mask: as for `top_k`.

    Returns:
        As `top_k`.
    """
    distance = 1.0 - cosine(features, features).to(mask.device)
    width = distance.shape[1]
    itself = torch.eye(width, dtype=torch.bool, device=mask.device)
    nearest = distance.masked_fill(itself | ~mask[:, None], float("inf")).amin(dim=2)
    free = mask.clone()
    picks: list[torch.Tensor] = []
    for _ in range(max(counts)):
        pick = nearest.masked_fill(~free, float("-inf")).argmax(dim=1, keepdim=True)
        to_pick = tokens_at(distance, pick)[:, 0]
        nearest = torch.minimum(nearest, to_pick) if picks else to_pick
        free = free.scatter(1, pick, False)
        picks.append(pick)
    return first_picks(torch.cat(picks, dim=1), counts, width)


# Gains of a determinant below this are rounding noise.
SMALLEST_GAIN = 1e-6


def dpp_map(
    features: torch.Tensor, quality: torch.Tensor, counts: Sequence[int], mask: torch.Tensor
) -> torch.Tensor:
    """The tokens that `dpp_order` picks first.

    Args:
        features, quality: as for `dpp_order`.
        counts, mask: as for `top_k`.

    Returns:
        As `top_k`.
    """
    order = dpp_order(features, quality, max(counts), mask)
    return first_picks(order, counts, features.shape[1])


def dpp_order(
    features: torch.Tensor, quality: torch.Tensor, steps: int, mask: torch.Tensor
) -> torch.Tensor:
    """Greedy MAP of a determinantal point process with kernel L_ij = q_i cos(f_i, f_j) q_j.

    Each pick is the token that multiplies the determinant of the picked tokens' kernel the most, found
    with one row of the Cholesky factor per pick (Chen et al., NeurIPS 2018, arxiv.org/abs/1709.05135).
    Tokens that multiply it by nothing, as all do once the rank is reached, follow by quality.

    Args:
        features: [batch, V, size].
        quality: [batch, V], within [0, 1].
        steps: how many tokens to pick.
        mask: as for `top_k`.

    Returns:
        LongTensor [batch, steps], positions in the order of their picks. Those behind a prompt's last real
        token mean nothing.
    """
    none, quality = float("-inf"), quality.detach()
    kernel = cosine(features.detach(), features.detach()).to(mask.device)
    kernel = kernel * quality[:, :, None] * quality[:, None]
    # What a token multiplies the determinant by; 0 for those that cannot be picked.
    gain = kernel.diagonal(dim1=1, dim2=2).masked_fill(~mask, 0.0)
    rest = (quality - 2.0).masked_fill_(~mask, none)
    factor = kernel.new_zeros(len(kernel), steps, kernel.shape[1])
    picks = mask.new_empty(len(kernel), steps, dtype=torch.long)
    for step in range(steps):
        pick = torch.where(gain > SMALLEST_GAIN, gain, rest).argmax(dim=1, keepdim=True)
        row, before = tokens_at(kernel, pick), factor[:, :step]
        if step:
            own = before.gather(2, pick[:, None].expand(-1, step, -1))
            row = torch.baddbmm(row, own.transpose(1, 2), before, alpha=-1)
        scale = gain.gather(1, pick)
        scale = scale.rsqrt().masked_fill_(scale <= SMALLEST_GAIN, 0.0)
        row = row[:, 0] * scale
        factor[:, step] = row
        gain = gain.addcmul_(row, row, value=-1).scatter_(1, pick, 0.0)
        rest.scatter_(1, pick, none)
        picks[:, step] = pick[:, 0]
    return picks


RELEVANCE_POWER = 1.5
"""Power of the relevance in `relevance_and_diversity`: the best of those that were tried for a first cut."""


def relevance_and_diversity(
    relevance: torch.Tensor, features: torch.Tensor, steps: int, mask: torch.Tensor
) -> torch.Tensor:
    """Scores that rank tokens by relevance and diversity at once, float32 [batch, V].

    The order is the one in which a determinantal point process with kernel L_ij = q_i cos(f_i, f_j) q_j picks
    tokens greedily, as in CDPruner (NeurIPS 2025, arxiv.org/abs/2506.10967). q is the relevance, scaled so that
    the prompt's highest is 1, to the power RELEVANCE_POWER. Tokens that are not picked follow by q.

    Args:
        relevance: [batch, V], 0 or more.
        features: [batch, V, size].
        steps: how many tokens to pick; each takes a few small operations.
        mask: bool [batch, V], False for padding.
    """
    relevance = relevance.where(mask, 0.0)
    highest = relevance.amax(dim=1, keepdim=True)
    quality = (relevance / highest.clamp(min=torch.finfo(relevance.dtype).tiny)) ** RELEVANCE_POWER
    picks = dpp_order(features, quality, steps, mask)
    place = torch.arange(steps, 0, -1, device=picks.device, dtype=quality.dtype)
    # What is picked again, behind a prompt's last token, keeps its first place.
    return quality.scatter_reduce(1, picks, (place + 1).expand_as(picks), "amax")


def weighted_coverage(
    features: torch.Tensor, weight: torch.Tensor, counts: Sequence[int], mask: torch.Tensor
) -> torch.Tensor:
    """Greedy coverage: each pick is the token with the greatest weight times gain in coverage.

    A token is covered by its greatest cosine with any pick, at least 0; the coverage is the sum over
    all tokens. Ties go to the lower position.

    Args:
        features: [batch, V, size].
        weight: [batch, V], not negative.
        counts, mask: as for `top_k`.

    Returns:
        As `top_k`.
    """
    similarity = cosine(features, features).to(mask.device).masked_fill(~mask[:, None], 0.0)
    width = similarity.shape[1]
    covered, free = similarity.new_zeros(similarity.shape[:2]), mask
    picks: list[torch.Tensor] = []
    for _ in range(max(counts)):
        gain = (similarity - covered[:, None]).clamp(min=0).sum(dim=2)
        pick = (weight * gain).masked_fill(~free, float("-inf")).argmax(dim=1, keepdim=True)
        by_pick = tokens_at(similarity, pick)[:, 0]
        covered = torch.maximum(covered, by_pick)
        free = free.scatter(1, pick, False)
        picks.append(pick)
    return first_picks(torch.cat(picks, dim=1), counts, width)


def evenly_spaced(pool: torch.Tensor, number: torch.Tensor) -> torch.Tensor:
    """Every so-many-th token of a pool, bool [batch, V]: `number` in all, or the whole pool.

    Args:
        pool: bool [batch, V].
        number: LongTensor [batch].
    """
    size = pool.sum(dim=1, keepdim=True)
    rank = pool.cumsum(dim=1) - 1
    return pool & ((rank * number[:, None] + size // 2) % size.clamp(min=1) < number[:, None])


def without_duplicates(
    features: torch.Tensor,
    order: torch.Tensor,
    present: Sequence[int],
    number: torch.Tensor,
    counts: Sequence[int],
    at_once: int,
) -> torch.Tensor:
    """Remove tokens that resemble another one, a few at a time, until so many are left.

    In each round every other token of the current order is compared with all those between, and those
    with the closest counterpart leave, at most `at_once`; the others follow in the order of closeness,
    in front of those they were compared with. From VisPruner (ICCV 2025).

    Args:
        features: [batch, V, size], compared by cosine.
        order: LongTensor [batch, V], positions, candidates first.
        present, number: at most how many candidates each prompt has, and how many it really has
            (LongTensor [batch]).
        counts: how many are to be left, at least one; all stay where there are fewer.

    Returns:
        bool [batch, V], the candidates that are left.
    """
    similarity, lowest = cosine(features, features).to(order.device), float("-inf")
    counts = [max(count, 1) for count in counts]
    goal = to_device(counts, order.device)
    left = list(present)
    while True:
        order = order[:, : max(left)]
        rank = torch.arange(order.shape[1], device=order.device)
        if all(n <= count for n, count in zip(left, counts, strict=True)):
            break
        real = rank < number[:, None]
        first, second = order[:, ::2], order[:, 1::2]
        pairs = tokens_at(similarity, first)
        pairs = pairs.gather(2, second[:, None].expand(-1, first.shape[1], -1))
        closest = pairs.masked_fill(~real[:, None, 1::2], lowest).amax(dim=2)
        closest = closest.masked_fill(~real[:, ::2], lowest)
        leaving = torch.minimum((number - goal).clamp(0, at_once), number // 2)
        nearest_first = closest.sort(dim=1, descending=True, stable=True).indices
        stays = rank[: first.shape[1]] >= leaving[:, None]
        stays = torch.cat([stays & real[:, ::2], real[:, 1::2]], dim=1)
        order = torch.cat([first.gather(1, nearest_first), second], dim=1)
        order = order.gather(1, stays.sort(dim=1, descending=True, stable=True).indices)
        number = number - leaving
        left = [n - min(max(n - c, 0), at_once, n // 2) for n, c in zip(left, counts, strict=True)]
    survivors = torch.zeros(similarity.shape[:2], dtype=torch.bool, device=order.device)
    return survivors.scatter(1, order, rank < number[:, None])
