"""The arithmetic of the released AutoPrune code, quirks included.

It differs from the method as described (and from `autoprune.policy.solver`): the retention schedule counts
the tokens LEAVING each layer, merged ones included, is found by bisection, and may miss the budget.
Plans are made in float64, executed in float32. N is the number of visual tokens, L of layers, B the
target mean, n1 the count after layer 0. Nothing here prunes; see `released_mutual_information` for
the estimate the slope is computed from and `released_prefill_macs` for the code's own cost counter.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

AMPLITUDE = 0.75
"""Height of the released logistic curve."""

FIRST_CUT_FACTOR = 2.5
RECYCLED_SHARE = 0.3
_HIGHEST_SCALE = 20.0
_BISECTION_STEPS = 200


@dataclass(frozen=True)
class ReleasedCounts:
    """What happens at every layer, `[L]` each; entry 0 is the cut after layer 0.

    kept: visual tokens that stay. clusters: merged tokens appended to them. leaving: their sum,
    which enters the next layer.
    """

    kept: tuple[int, ...]
    clusters: tuple[int, ...]
    leaving: tuple[int, ...]

    def entering(self, num_visual: int) -> tuple[int, ...]:
        """Visual tokens entering each layer, `[L]`."""
        return (num_visual, *self.leaving[:-1])


@dataclass(frozen=True)
class ReleasedSchedule:
    """Result of the released search.

    fractions: float64 `[L-1]`, for layers 1..L-1, relative to n1 - 1 and not clamped to 1.
    early_return: the raw curve passed the pre-check, and the search was skipped.
    precheck_sum: the token sum of that pre-check. scale: factor on the raw curve.
    planned: counts as the search sees them (float64); the runtime's may differ by one token.
    """

    fractions: np.ndarray
    early_return: bool
    precheck_sum: int
    scale: float
    planned: ReleasedCounts


def dynamic_slope(mi: float, k0: float, gamma: float) -> float:
    """Slope of the released curve, `k = max(k0 - gamma * mi, 0)`, in double precision.

    Args:
        mi: layer 1's mutual information, summed over heads, in bits.
        k0: slope at zero information.
        gamma: how much a bit lowers it.
    """
    return max(k0 - gamma * mi, 0.0)


def first_cut_count(target: float, num_visual: int) -> int:
    """Visual tokens kept after layer 0: `n1 = min(int(2.5 B), N)`."""
    return min(int(FIRST_CUT_FACTOR * target), num_visual)


def recycled_count(discarded: int) -> int:
    """How many of the discarded tokens are merged rather than lost: `int(0.3 d) + 1`, 0 if nothing
    is discarded.
    """
    return int(RECYCLED_SHARE * discarded) + 1 if discarded > 0 else 0


def cluster_count(recycled: int) -> int:
    """How many merged tokens come out of them: `min(int(m / 10) + 1, m)`."""
    return min(recycled // 10 + 1, recycled)


def released_keep_fractions(
    num_layers: int,
    num_visual: int,
    target: float,
    n1: int,
    x0: float,
    k: float,
    recycle: bool = True,
) -> ReleasedSchedule:
    """The retention schedule that the released code searches for a slope k.

    The raw curve `0.75 / (1 + exp(k (i - (x0 + k))))`, i = 1..L-1, is scaled by the bisection
    result s in [0, 20] whose planned sum of leaving tokens comes closest to L * B; if the raw curve
    passes a pre-check with other bookkeeping (no merged tokens, n1 instead of n1 - 1, the last
    layer twice), it is used as it is.

    Args:
        num_layers: L, at least 2.
        num_visual: N.
        target: B, mean visual tokens leaving a layer.
        n1: tokens kept after layer 0, see `first_cut_count`.
        x0: midpoint parameter, an absolute layer index; the actual midpoint is x0 + k.
        k: slope, see `dynamic_slope`.
        recycle: False plans without merged tokens.

    Raises:
        ValueError: fewer than two layers.
    """
    if num_layers < 2:
        raise ValueError(
            f"num_layers must be at least 2, got {num_layers}; the curve starts after the first cut"
        )
    with np.errstate(over="ignore"):
        curve = AMPLITUDE / (1 + np.exp(k * (np.arange(1, num_layers) - (x0 + k))))
    budget = num_layers * target
    precheck = (np.float32(n1) * curve.astype(np.float32)).astype(np.int64)
    precheck_sum = int(precheck.sum() + precheck[-1])
    early_return = abs(precheck_sum - budget) < 1
    scale = 1.0 if early_return else _search_scale(curve, n1, num_visual, budget, recycle)
    return ReleasedSchedule(
        fractions=scale * curve,
        early_return=early_return,
        precheck_sum=precheck_sum,
        scale=scale,
        planned=_planned_counts(curve, scale, n1, num_visual, recycle),
    )


def released_runtime_counts(
    n1: int, fractions: np.ndarray, num_visual: int, recycle: bool = True
) -> ReleasedCounts:
    """What the released code does with the fractions: `kept = min(ceil(f32(n1 - 1) * f32(f)),
    current)`.

    Args:
        n1: tokens kept after layer 0.
        fractions: `[L-1]`, for layers 1..L-1, see `ReleasedSchedule`.
        num_visual: N; n1 is at most N.
        recycle: False loses all discarded tokens.
    """
    products = np.float32(n1 - 1) * np.asarray(fractions, dtype=np.float64).astype(np.float32)
    wanted = [math.ceil(product) for product in products.tolist()]
    return _follow(wanted, min(n1, num_visual), recycle)


def cluster_and_merge(
    x: Tensor, num_clusters: int, noise: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """DPC-KNN clustering of recycled tokens, each cluster merged into the mean of its members.

    `D_ij = ||x_i - x_j|| / sqrt(C)`; density_i = exp(-mean of D^2 over the K nearest, i itself
    included); delta_i = distance to the nearest token of strictly higher density, the largest
    distance of all if there is none. The K largest delta * density are the centres, every token
    joins the nearest, `merged = sum / (count + 1e-6)`.

    Args:
        x: hidden states `[m, C]`, by descending score.
        num_clusters: K, between 1 and m.
        noise: `[m]` in [0, 1), scaled by 1e-6 and added to the densities, as the released code does
            with random numbers; None adds nothing, and equal centre scores then go to the lower
            index.

    Returns:
        centers: LongTensor `[K]`, indices into x by descending centre score, which is the cluster
            order.
        assign: LongTensor `[m]`, the cluster of each token.
        merged: `[K, C]`.

    Raises:
        ValueError: x is not `[m, C]` or num_clusters is out of range.
    """
    if x.dim() != 2 or not 1 <= num_clusters <= x.shape[0]:
        raise ValueError(
            "x must be [m, C] with 1 <= num_clusters <= m, "
            f"got shape {list(x.shape)} and num_clusters={num_clusters}"
        )
    distance = torch.cdist(x[None], x[None])[0] / x.shape[1] ** 0.5
    nearest = distance.topk(num_clusters, dim=-1, largest=False).values
    density = (-(nearest**2).mean(dim=-1)).exp()
    if noise is not None:
        density = density + noise.to(density) * 1e-6
    denser = density[None, :] > density[:, None]
    delta = torch.where(denser, distance, distance.max()).amin(dim=-1)
    centers = torch.sort(delta * density, descending=True, stable=True).indices[:num_clusters]

    assign = distance[centers].argmin(dim=0)
    assign[centers] = torch.arange(num_clusters, device=x.device)
    members = torch.nn.functional.one_hot(assign, num_clusters).to(x)
    merged = (members.T @ x) / (members.sum(dim=0)[:, None] + 1e-6)
    return centers, assign, merged


def _search_scale(
    curve: np.ndarray, n1: int, num_visual: int, budget: float, recycle: bool
) -> float:
    """The first scale of a bisection with the smallest deviation from the budget."""
    low, high = 0.0, _HIGHEST_SCALE
    best, smallest = 0.0, math.inf
    for _ in range(_BISECTION_STEPS):
        scale = (low + high) / 2
        spent = sum(_planned_counts(curve, scale, n1, num_visual, recycle).leaving)
        deviation = abs(spent - budget)
        if deviation < smallest:
            best, smallest = scale, deviation
            if deviation < 0.01:
                break
        if spent < budget:
            low = scale
        else:
            high = scale
    return best


def _planned_counts(
    curve: np.ndarray, scale: float, n1: int, num_visual: int, recycle: bool
) -> ReleasedCounts:
    fractions = np.minimum(1.0, scale * curve)
    wanted = [min(math.ceil(product), num_visual) for product in ((n1 - 1) * fractions).tolist()]
    return _follow(wanted, n1, recycle)


def _follow(wanted: list[int], first: int, recycle: bool) -> ReleasedCounts:
    """Counts from layer to layer: what is wanted but not there cannot be kept, what is dropped may
    be merged.
    """
    kept, clusters, leaving = [first], [0], [first]
    for count in wanted:
        keep = max(min(count, leaving[-1]), 0)
        merged = cluster_count(recycled_count(leaving[-1] - keep)) if recycle else 0
        kept.append(keep)
        clusters.append(merged)
        leaving.append(keep + merged)
    return ReleasedCounts(tuple(kept), tuple(clusters), tuple(leaving))
