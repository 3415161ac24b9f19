"""The exact solver, which turns a retention curve into visual tokens per layer that spend a budget.

n_l is the number of visual tokens that ENTER decoder layer l = 0..L-1. Token and ratio budgets are
spent exactly, FLOPs and KV budgets are never exceeded and left with less than the price of one more
token in any layer.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .budget import Budget, InfeasibleBudget
from .cost import DecoderCost
from .limits import Limits, bounds, rows
from .rounding import round_to_total, round_within_cost, solve_last_first, water_fill

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

_DECIMALS = {"tokens": 4, "ratio": 8, "flops": 8}


def solve_schedule(
    weights: ArrayLike,
    num_visual: ArrayLike,
    budget: Budget | float,
    cost: DecoderCost | None = None,
    num_text: ArrayLike = 0,
    fixed: ArrayLike | None = None,
    floors: ArrayLike = 1,
    caps: ArrayLike | None = None,
) -> Ints:
    """Visual tokens entering each layer: follows the curve, never increases with depth, spends
    exactly the budget.

    `n_l = clip(s w_l, floor_l, cap_l)` at the one scale s that spends the budget, rounded by
    largest remainders (ties to the shallower layer). Curves that rise somewhere are replaced by
    their running minimum, caps likewise, floors by their running maximum from the last layer up.
    Rows are independent: the same in every batch, bit for bit.

    Args:
        weights: positive retention curve, `[batch, L]` or `[L]`; only its shape matters, not its
            scale.
        num_visual: N of each prompt, `[batch]` or scalar. A prompt with N = 0 gets zeros.
        budget: see `Budget`; a number means `Budget.tokens`.
        cost: the decoder's cost, needed for FLOPs and KV budgets.
        num_text: tokens of each prompt that are not visual, `[batch]` or scalar (FLOPs and KV
            budgets).
        fixed: counts of the first F layers, decided already, `[batch, F]`; later layers stay at or
            below the last.
        floors: at least so many tokens in a layer, scalar, `[L]` or `[batch, L]`; a prompt with
            fewer keeps all.
        caps: at most so many tokens in a layer, scalar, `[L]` or `[batch, L]`.

    Returns:
        int64 `[batch, L]`.

    Raises:
        InfeasibleBudget: the floors and fixed layers cost more than the budget, or the caps do not
            let it be spent.
        ValueError: shapes or values that do not fit; floors above caps; a missing `cost`.
    """
    budget = Budget.of(budget)
    visual, curve = rows(weights, num_visual)
    limits = bounds(visual, curve.shape[1], num_text, fixed, floors, caps)
    if budget.counted == "leaving" and limits.layers > 1 and limits.fixed.shape[1] == 0:
        # What enters layer 0 is not counted, so nothing is gained by entering less.
        limits = Limits(
            visual, limits.text, limits.caps[:, :1], limits.floors[:, 1:], limits.caps[:, 1:]
        )
    curve = curve[:, limits.fixed.shape[1] :]
    if budget.kind == "flops":
        free = _spend_flops(curve, limits, budget, _needed(cost, budget, limits))
    elif budget.counted == "leaving":
        free = _spend_leaving(curve, limits, budget)
    else:
        free = _spend_tokens(curve, limits, budget, cost)
    return np.concatenate((limits.fixed, free), axis=1)


def smallest_feasible(
    budget: Budget | float,
    num_layers: int,
    num_visual: ArrayLike,
    cost: DecoderCost | None = None,
    num_text: ArrayLike = 0,
    fixed: ArrayLike | None = None,
    floors: ArrayLike = 1,
    caps: ArrayLike | None = None,
) -> Budget:
    """The smallest budget of the given one's kind that `solve_schedule` accepts for all these
    prompts.

    Arguments and errors as for `solve_schedule`. Shares are rounded up in the eighth decimal, means
    in the fourth.
    """
    visual = np.atleast_1d(np.asarray(num_visual, dtype=np.int64))
    limits = bounds(visual, num_layers, num_text, fixed, floors, caps)
    return _smallest(Budget.of(budget), limits, cost)


def _needed(cost: DecoderCost | None, budget: Budget, limits: Limits) -> DecoderCost:
    if cost is None:
        raise ValueError(
            f"a budget of {budget} needs the decoder's cost; "
            "pass cost=DecoderCost.from_config(config)"
        )
    if cost.layers != limits.layers:
        raise ValueError(
            f"cost describes {cost.layers} layers, but the weights have {limits.layers}; "
            "pass one weight for each decoder layer"
        )
    return cost


def _asked_tokens(budget: Budget, limits: Limits, cost: DecoderCost | None) -> Ints:
    """Visual tokens, summed over all layers, that the budget pays for; at most L * N."""
    full = limits.layers * limits.visual
    if budget.kind == "kv_bytes":
        per_token = _needed(cost, budget, limits).kv_bytes_per_token
        affordable = (
            min(int(budget.value) // per_token, np.iinfo(np.int64).max)
            - limits.layers * limits.text
        )
        return np.minimum(affordable, full)
    asked = limits.layers * budget.value * (limits.visual if budget.kind == "ratio" else 1)
    return np.minimum(np.rint(asked), full).astype(np.int64)


def _spend_tokens(curve: Floats, limits: Limits, budget: Budget, cost: DecoderCost | None) -> Ints:
    total = _asked_tokens(budget, limits, cost) - limits.fixed.sum(axis=1)
    spendable = limits.caps.sum(axis=1)
    if budget.kind == "kv_bytes":
        total = np.minimum(total, spendable)
    total = _affordable(total, limits.floors.sum(axis=1), budget, limits, cost)
    if (total > spendable).any():
        most = (limits.fixed.sum(axis=1) + spendable)[total > spendable]
        raise _unspendable(budget, limits, most / limits.layers)
    return round_to_total(water_fill(curve, limits.floors, limits.caps, total), total)


def _spend_leaving(curve: Floats, limits: Limits, budget: Budget) -> Ints:
    prices, done = _leaving_prices(limits.layers), limits.fixed.shape[1]
    spent = (prices[:done] * limits.fixed).sum(axis=1)
    prices = prices[done:]
    total = _asked_tokens(budget, limits, None) - spent
    total = _affordable(total, (prices * limits.floors).sum(axis=1), budget, limits, None)
    spendable = (prices * limits.caps).sum(axis=1)
    if (total > spendable).any():
        most = (spent + spendable)[total > spendable]
        raise _unspendable(budget, limits, most / limits.layers)
    counts = solve_last_first(curve, limits.floors, limits.caps, total, prices)
    if ((prices * counts).sum(axis=1) != total).any():
        raise _unspendable(budget, limits, None)
    return counts


def _leaving_prices(layers: int) -> Ints:
    """How often each n_l occurs among the counts that leave layers 0..L-1."""
    prices = np.ones(layers, dtype=np.int64)
    if layers > 1:
        prices[0], prices[-1] = 0, 2
    return prices


def _spend_flops(curve: Floats, limits: Limits, budget: Budget, cost: DecoderCost) -> Ints:
    share, free_layers = budget.value, limits.floors.shape[1]
    full = limits.layers * cost.layer_flops(limits.visual + limits.text)
    allowed = full if share == 1 else np.minimum(np.floor(share * full).astype(np.int64), full)
    total = allowed - cost.layer_flops(limits.fixed + limits.text[:, None]).sum(axis=1)
    total = total - free_layers * cost.layer_flops(limits.text)
    # With t text tokens, a (n + t) + b (n + t)^2 is a constant plus (a + 2 b t) n + b n^2.
    price = cost.linear_flops + 2 * cost.attention_flops * limits.text
    square = cost.attention_flops

    def spending(counts: Ints) -> Ints:
        spent: Ints = price * counts.sum(axis=1) + square * (counts * counts).sum(axis=1)
        return spent

    total = _affordable(total, spending(limits.floors), budget, limits, cost)
    total = np.minimum(total, spending(limits.caps))
    real = water_fill(curve, limits.floors, limits.caps, total, price[:, None], float(square))
    return round_within_cost(real, limits.floors, limits.caps, total, price, square)


def _affordable(
    total: Ints, least: Ints, budget: Budget, limits: Limits, cost: DecoderCost | None
) -> Ints:
    """`total`, after refusing rows whose floors cost more; prompts without visual tokens spend
    nothing.
    """
    empty = limits.visual == 0
    if ((total < least) & ~empty).any():
        raise _too_small(budget, limits, cost)
    return np.where(empty, 0, total)


def _too_small(budget: Budget, limits: Limits, cost: DecoderCost | None) -> InfeasibleBudget:
    smallest = _smallest(budget, limits, cost)
    undecided = _smallest(budget, limits.reopened(), cost)
    way_out = (
        'set first_cut="pre_llm", which prunes before layer 0 sees every visual token '
        f"and is feasible down to {undecided.expression}"
        if undecided.value < smallest.value
        else ""
    )
    return InfeasibleBudget.too_small(
        budget,
        smallest,
        "the layers that are already decided and the least that every other layer must keep",
        way_out,
    )


def _unspendable(budget: Budget, limits: Limits, most: Floats | None) -> InfeasibleBudget:
    reason = (
        "no schedule of these layers has exactly that sum"
        if most is None
        else f"caps and decided layers allow at most {most.min():g} visual tokens a layer"
    )
    return InfeasibleBudget(
        f"a budget of {budget} cannot be spent exactly over {limits.layers} layers: {reason}; "
        "lower the budget, or raise the caps or the earlier cuts",
        budget,
    )


def _smallest(budget: Budget, limits: Limits, cost: DecoderCost | None) -> Budget:
    present = limits.visual > 0
    if not present.any():
        raise ValueError("no prompt has visual tokens, so there is no smallest budget")
    counts, visual, text = limits.cheapest[present], limits.visual[present], limits.text[present]
    if budget.kind == "kv_bytes":
        return Budget.kv_bytes(
            max(1, int(_needed(cost, budget, limits).kv_bytes(counts, text).max()))
        )
    unit = 10 ** _DECIMALS[budget.kind]
    if budget.kind == "flops":
        cost = _needed(cost, budget, limits)
        full = limits.layers * cost.layer_flops(visual + text)
        need = cost.prefill_flops(counts, text)
        steps = max(1, math.ceil((need / full).max() * unit))
        while (np.floor(steps / unit * full) < need).any() and steps < unit:
            steps += 1
        return Budget.flops(min(1.0, steps / unit))
    prices = _leaving_prices(limits.layers) if budget.counted == "leaving" else np.int64(1)
    sums = np.maximum((prices * counts).sum(axis=1), 1)
    per_layer = sums / limits.layers / (visual if budget.kind == "ratio" else 1)
    value = math.ceil(per_layer.max() * unit) / unit
    return (
        Budget.ratio(min(1.0, value))
        if budget.kind == "ratio"
        else Budget.tokens(value, budget.counted)
    )
