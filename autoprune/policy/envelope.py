"""The largest schedules of a family of curves: how many visual tokens a layer must have room for.

A prompt's retention curve is known when the prompt has been seen, and a buffer for its tokens is made
before that. What the buffer must hold is bounded here for every curve the prompt may turn out to have.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .budget import Budget
from .cost import DecoderCost
from .curves import Curve
from .solver import solve_schedule

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


def envelope(
    curve: Curve,
    slopes: ArrayLike,
    midpoints: ArrayLike,
    num_visual: int,
    budget: Budget,
    decided: Ints,
    layers: int,
    cost: DecoderCost | None = None,
    num_text: int = 0,
    transform: Callable[[Floats], Floats] = lambda retained: retained,
) -> list[int]:
    """At least what `solve_schedule` gives any layer, for every curve along a path of parameters.

    Between two neighbouring points of the path both parameters may lie anywhere between theirs. There a
    layer gets most if its own retention is as high as can be and that of all others as low: one
    schedule for each piece of the path and each layer, and rounding on top.

    Args:
        curve: see `autoprune.policy.curves`.
        slopes, midpoints: the path, `[points]`; the midpoint does not change its sign between two points.
        num_visual, num_text, budget, cost: as for `solve_schedule`, of one prompt.
        decided: counts of the first layers, `[1, decided]`.
        layers: L.
        transform: what is done with a curve's values [curves, L] before the solver sees them; raising one of
            them must not lower any result.

    Returns:
        L counts, never rising with depth.

    Raises:
        InfeasibleBudget: the budget cannot be met.
    """
    done = decided.shape[1]
    if done == layers:
        return decided[0].tolist()
    margin = _margin(budget, num_visual, num_text, cost)
    if budget.counted == "leaving":
        budget = _as_entering(budget, decided, layers)
    low, high = map(transform, _extremes(curve, np.asarray(slopes), np.asarray(midpoints), layers))
    layer = np.arange(layers)
    own = np.arange(done, layers)[:, None]
    most, least = high[:, done:, None], low[:, None, :]
    weights = np.where(layer == own, most, least)
    # A curve never rises with depth.
    weights = np.where(layer < own, np.maximum(least, most), weights).reshape(-1, layers)
    counts = solve_schedule(
        weights,
        np.full(len(weights), num_visual),
        budget,
        cost=cost,
        num_text=num_text,
        fixed=np.repeat(decided, len(weights), axis=0),
    ).reshape(-1, layers - done, layers)
    largest = np.diagonal(counts, done, axis1=1, axis2=2).max(axis=0)
    return np.minimum.accumulate(np.concatenate((decided[0], largest + margin))).tolist()


def _extremes(
    curve: Curve, slopes: Floats, midpoints: Floats, layers: int
) -> tuple[Floats, Floats]:
    """The lowest and the highest retention on each piece of a path, `[pieces, L]`: at its corners.

    All curves are monotone in the slope and in the midpoint, for a midpoint that keeps its sign.
    """
    corners = [
        curve(np.arange(layers), k, x0)
        for k in (slopes[:-1], slopes[1:])
        for x0 in (midpoints[:-1], midpoints[1:])
    ]
    return np.minimum.reduce(corners), np.maximum.reduce(corners)


def _as_entering(budget: Budget, decided: Ints, layers: int) -> Budget:
    """The same sum and layer 0, as a budget of tokens entering: it pays for the last layer once instead of
    twice, and so for a little more in all.
    """
    most = decided.sum() + (layers - decided.shape[1]) * decided[0, -1]
    num_visual = decided[0, 0]
    allowed = budget.allowed(layers, num_visual) + num_visual
    return Budget.tokens(min(allowed, most) / layers)


def _margin(budget: Budget, num_visual: int, num_text: int, cost: DecoderCost | None) -> int:
    """By how many tokens a count may exceed that of a schedule which lies above it before rounding."""
    if budget.counted == "leaving":
        # Rounding the last layer by up to 1.5 frees up to 3 tokens for another one.
        return 5
    if budget.kind == "flops":
        # What rounding leaves over, less than the dearest token's price, may pay for cheaper ones.
        assert cost is not None
        cheapest = cost.linear_flops + cost.attention_flops * (2 * num_text + 1)
        return 3 + 2 * cost.attention_flops * num_visual // cheapest
    return 1
