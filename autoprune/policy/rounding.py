"""Integer water filling: turns a retention curve, floors and caps into token counts that spend a
total. The total itself, and how it is rounded, is `Budget.allowed`.

All functions take one row per prompt and treat rows independently: a row's result is bitwise the
same in any batch. The curve, the floors and the caps never increase along the layers, and neither
do the results.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

FEW_LEVELS = 256
"""So many breakpoints are looked at all at once."""

SMALLEST_WEIGHT = 1e-100
"""Weights below this share of a row's largest one are raised to it, so that no intermediate product
leaves float64.
"""


def water_fill(
    weights: Floats,
    floors: Ints,
    caps: Ints,
    total: Ints,
    linear: Ints | float = 1,
    quadratic: float = 0.0,
) -> Floats:
    """Real-valued `x_l = clip(s w_l, floor_l, cap_l)` at the level s where `sum_l (linear_l x +
    quadratic x^2) = total`.

    The spending is piecewise quadratic in s with a breakpoint wherever a layer leaves its floor or
    meets its cap. The last breakpoint that is still affordable tells which layers are in between;
    for those s follows in closed form.

    Args:
        weights: positive, non-increasing, `[batch, layers]`, at most 1 (see `normalised`).
        floors, caps: non-increasing token counts `[batch, layers]`, floors <= caps.
        total: what to spend, `[batch]`, between the spending at the floors and at the caps.
        linear: cost of a token, broadcastable to `[batch, layers]`.
        quadratic: cost of a squared count.

    Returns:
        `[batch, layers]`, non-increasing along the layers.
    """
    lower, upper = floors.astype(np.float64), caps.astype(np.float64)
    leaves_floor, meets_cap = lower / weights, upper / weights
    costs = np.atleast_2d(np.asarray(linear, dtype=np.float64))

    def spent_at(levels: Floats) -> Floats:
        filled = levels[:, :, None] * weights[:, None, :]
        np.maximum(filled, lower[:, None, :], out=filled)
        np.minimum(filled, upper[:, None, :], out=filled)
        return _spending(filled, costs[:, None, :], quadratic)

    level = _last_affordable(spent_at, np.concatenate((leaves_floor, meets_cap), axis=1), total)
    between = (leaves_floor <= level) & (meets_cap > level)
    settled = np.where(between, 0.0, np.where(meets_cap <= level, upper, lower))
    rest = np.maximum(total - _spending(settled, costs, quadratic), 0.0)
    active = np.where(between, weights, 0.0)
    divisor = (costs * active).sum(axis=1)
    if quadratic:
        curvature = quadratic * (active * active).sum(axis=1)
        divisor = (divisor + np.sqrt(divisor * divisor + 4.0 * curvature * rest)) / 2.0
    scale = level[:, 0].copy()
    np.divide(rest, divisor, out=scale, where=divisor > 0)
    return np.minimum(np.maximum(scale[:, None] * weights, lower), upper)


def _last_affordable(spent_at: Callable[[Floats], Floats], levels: Floats, total: Ints) -> Floats:
    """The highest of `levels [batch, n]` that spends at most `total`, `[batch, 1]`; 0 if none does.

    On large batches it looks at every sqrt(n)-th level first and then at those up to the next one:
    evaluating them all at once would be the bulk of the solver's time.
    """
    if levels.shape[1] == 0:
        return np.zeros((len(levels), 1))
    if levels.size <= FEW_LEVELS:
        affordable = np.where(spent_at(levels) <= total[:, None], levels, 0.0)
        return affordable.max(axis=1, keepdims=True)
    levels = np.sort(levels, axis=1)
    stride = math.isqrt(levels.shape[1])
    start = (spent_at(levels[:, ::stride]) <= total[:, None]).sum(axis=1, keepdims=True) - 1
    window = np.maximum(start, 0) * stride + np.arange(stride)
    near = np.take_along_axis(levels, np.minimum(window, levels.shape[1] - 1), axis=1)
    return np.where(spent_at(near) <= total[:, None], near, 0.0).max(axis=1, keepdims=True)


def normalised(weights: Floats) -> Floats:
    """A curve that never increases with depth (running minimum), its largest weight scaled to 1 in
    every row.
    """
    falling = np.minimum.accumulate(weights, axis=1)
    return np.maximum(falling / falling[:, :1], SMALLEST_WEIGHT)


def round_to_total(real: Floats, total: Ints) -> Ints:
    """Largest-remainder rounding of `real [batch, layers]`, summing to `total [batch]` exactly.

    Equal remainders go to the shallower layer. Within a run of equal floors the remainders never
    increase with depth, hence neither do the counts; and a layer on an integer bound has no
    remainder, so bounds are kept.
    """
    counts = np.floor(real)
    order = _by_remainder(real - counts)
    missing = total - counts.sum(axis=1).astype(np.int64)
    rounded = counts.astype(np.int64)
    batch, layers = real.shape
    place = order + layers * np.arange(batch)[:, None]
    rounded.reshape(-1)[place] += np.arange(layers) < missing[:, None]
    return rounded


def round_within_cost(
    real: Floats, floors: Ints, caps: Ints, total: Ints, linear: Ints, quadratic: int
) -> Ints:
    """Rounds `real [batch, layers]` so that no count could be one higher without spending more than
    `total [batch]`.

    A row spends `sum_l (linear n_l + quadratic n_l^2)` with `linear [batch]`; exact integer
    arithmetic.
    """
    # Rounding errors of the real solution must not lift a count above what can be paid.
    safe = np.maximum(real * (1.0 - 1e-9), floors)
    counts = np.floor(safe).astype(np.int64)
    price = linear[:, None]

    order = _by_remainder(np.where(counts < caps, safe - counts, -1.0))
    slack = total - _spending(counts, price, quadratic)
    raised = np.take_along_axis(_next_token(counts, caps, price, quadratic), order, axis=1)
    affordable = np.cumsum(np.minimum(raised, slack[:, None] + 1), axis=1) <= slack[:, None]
    extra = np.zeros_like(counts)
    np.put_along_axis(extra, order, affordable, axis=1)
    counts += extra

    # What is left may still pay for tokens in deeper layers, where they are cheaper.
    while True:
        slack = total - _spending(counts, price, quadratic)
        open_step = np.ones(counts.shape, dtype=bool)
        open_step[:, 1:] = counts[:, :-1] > counts[:, 1:]
        possible = open_step & (_next_token(counts, caps, price, quadratic) <= slack[:, None])
        rows = possible.any(axis=1)
        if not rows.any():
            return counts
        counts[rows, possible[rows].argmax(axis=1)] += 1


def solve_last_first(curve: Floats, floors: Ints, caps: Ints, total: Ints, prices: Ints) -> Ints:
    """Counts that follow the curve and cost `total [batch]` when only the last layer has a price.

    The last layer's count is chosen first, next to its real-valued optimum, and the others, which
    cost 1 each, take the rest. Where no counts cost exactly `total` the result costs less.

    Args:
        curve, floors, caps: as for `water_fill`, `[batch, layers]`.
        total: between the costs of the floors and of the caps.
        prices: per layer, `[layers]`; all 1 but the last.
    """
    if prices.size == 0:
        return floors
    real, price = water_fill(curve, floors, caps, total, linear=prices)[:, -1], prices[-1]
    upper = caps[:, :-1].sum(axis=1)
    # What the last layer does not take must fit under the caps of the others ...
    last = np.maximum(np.floor(real + 0.5).astype(np.int64), -((upper - total) // price))
    # ... and reach their floors, which one less than the next integer always does.
    last -= np.maximum(floors[:, :-1], last[:, None]).sum(axis=1) + price * last > total
    rest = np.minimum(total - price * last, upper)
    if prices.size == 1:
        return last[:, None]
    lower = np.maximum(floors[:, :-1], last[:, None])
    others = round_to_total(water_fill(curve[:, :-1], lower, caps[:, :-1], rest), rest)
    return np.concatenate((others, last[:, None]), axis=1)


def _spending(counts: Any, linear: Any, quadratic: float) -> Any:
    if quadratic == 0:
        return (linear * counts).sum(axis=-1)
    return ((linear + quadratic * counts) * counts).sum(axis=-1)


def _next_token(counts: Ints, caps: Ints, linear: Ints, quadratic: int) -> Ints:
    """Cost of one more token in each layer; prohibitive for layers that are full."""
    price = linear + quadratic * (2 * counts + 1)
    return np.where(counts < caps, price, np.iinfo(np.int64).max // 2)


def _by_remainder(remainders: Floats) -> NDArray[np.intp]:
    """Layer indices by descending remainder, ties in depth order."""
    return np.argsort(-remainders, axis=1, kind="stable")
