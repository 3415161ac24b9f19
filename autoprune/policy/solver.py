"""The exact solver, which turns a retention curve into visual tokens per layer that spend a budget.

n_l is the number of visual tokens that ENTER decoder layer l = 0..L-1. `Budget` says what is allowed.
Tokens and ratios are spent exactly. FLOPs and bytes are never exceeded, and what is left of them is less
than the price of one more token in any layer.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .budget import Budget, InfeasibleBudget
from .cost import DecoderCost
from .rounding import (
    normalised,
    round_to_total,
    round_within_cost,
    solve_last_first,
    water_fill,
)

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


def solve_schedule(
    weights: ArrayLike,
    num_visual: ArrayLike,
    budget: Budget | float,
    cost: DecoderCost | None = None,
    num_text: ArrayLike = 0,
    fixed: ArrayLike | None = None,
    allowed: ArrayLike | None = None,
) -> Ints:
    """Visual tokens entering each layer: follows the curve, never increases with depth, spends the budget.

    `n_l = clip(s w_l, 1, n_F)` at the one scale s that spends the budget, rounded by largest remainders (ties
    to the shallower layer). n_F is N, or the last count that is decided. Curves that rise somewhere are
    replaced by their running minimum. Rows are independent: the same in every batch, bit for bit.

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
        allowed: what each prompt may spend, `[batch]`, in the unit of `Budget.allowed`; None for what the
            budget allows it alone.

    Returns:
        int64 `[batch, L]`.

    Raises:
        InfeasibleBudget: fixed layers, and one token in each of the others, cost more than the budget;
            or the fixed layers do not let it be spent.
        ValueError: shapes or values that do not fit; a missing `cost`.
    """
    budget = Budget.of(budget)
    task = _Task.of(weights, num_visual, num_text, fixed, budget, cost)
    total = _spendable(task, allowed)
    lower, upper = task.least, task.most
    if budget.kind == "flops":
        assert cost is not None
        # With t text tokens, a (n + t) + b (n + t)^2 is a constant plus (a + 2 b t) n + b n^2.
        price = cost.linear_flops + 2 * cost.attention_flops * task.text
        square = cost.attention_flops
        real = water_fill(task.curve, lower, upper, total, price[:, None], float(square))
        free = round_within_cost(real, lower, upper, total, price, square)
    elif budget.counted == "leaving":
        free = solve_last_first(task.curve, lower, upper, total, task.prices)
        if (task.spent(free) - task.spent(np.zeros_like(free)) != total).any():
            raise _unspendable(task, "no schedule of these layers has exactly that sum")
    else:
        if budget.kind == "kv_bytes":
            assert cost is not None
            total = total // cost.kv_bytes_per_token
        free = round_to_total(water_fill(task.curve, lower, upper, total), total)
    return np.concatenate((task.decided, free), axis=1)


@dataclass(frozen=True)
class _Task:
    """What is to be solved, a row per prompt.

    visual, text: tokens, `[batch]`. decided: counts of the first F layers, `[batch, F]`. curve: normalised
    retention of the free layers, those behind them, `[batch, L - F]`.
    """

    visual: Ints
    text: Ints
    decided: Ints
    curve: Floats
    budget: Budget
    cost: DecoderCost | None

    @classmethod
    def of(
        cls,
        weights: ArrayLike,
        num_visual: ArrayLike,
        num_text: ArrayLike,
        fixed: ArrayLike | None,
        budget: Budget,
        cost: DecoderCost | None,
    ) -> _Task:
        visual, curve = _rows(weights, num_visual)
        layers = curve.shape[1]
        text = np.zeros(len(visual), dtype=np.int64) + np.asarray(num_text, dtype=np.int64)
        decided = _decided(fixed, visual, text, layers)
        if budget.counted == "leaving" and layers > 1 and not decided.shape[1]:
            # What enters layer 0 is not counted, so nothing is gained by entering less.
            decided = visual[:, None]
        return cls(visual, text, decided, curve[:, decided.shape[1] :], budget, cost)

    @property
    def layers(self) -> int:
        return self.decided.shape[1] + self.curve.shape[1]

    @property
    def most(self) -> Ints:
        """The most tokens that each free layer may have."""
        last = np.column_stack((self.visual, self.decided))[:, -1:]
        return np.repeat(last, self.curve.shape[1], axis=1)

    @property
    def least(self) -> Ints:
        """The fewest."""
        return np.minimum(self.most, 1)

    @property
    def prices(self) -> Ints:
        """What a token in each free layer costs, for budgets of tokens: how often it is counted."""
        one_token: Ints = self.budget.spent(np.eye(self.layers, dtype=np.int64))
        return one_token[self.decided.shape[1] :]

    def whole(self, free: Ints) -> Ints:
        """The schedules [batch, L] with these counts in the free layers."""
        return np.concatenate((self.decided, free), axis=1)

    def spent(self, free: Ints) -> Ints:
        """What they cost, [batch]."""
        spent: Ints = self.budget.spent(self.whole(free), self.text, self.cost)
        return spent


def _spendable(task: _Task, given: ArrayLike | None) -> Ints:
    """What is left for the visual tokens of the free layers, [batch], in the budget's unit.

    Prompts without visual tokens spend nothing.

    Args:
        given: what each prompt may spend; None for what the budget allows it.
    """
    if given is None:
        allowed = task.budget.allowed(task.layers, task.visual, task.text, task.cost)
    else:
        allowed = np.asarray(given, dtype=np.int64)
    if ((task.spent(task.least) > allowed) & (task.visual > 0)).any():
        raise _too_small(task)
    most = task.spent(task.most)
    if task.budget.exact and (most < allowed).any():
        mean = most[most < allowed].min() / task.layers
        raise _unspendable(task, f"decided layers allow at most {mean:g} visual tokens a layer")
    nothing = task.spent(np.zeros_like(task.least))
    return np.where(task.visual > 0, np.minimum(allowed, most) - nothing, 0)


def _too_small(task: _Task) -> InfeasibleBudget:
    present = task.visual > 0

    def smallest_for(schedules: Ints) -> Budget:
        visual, text = task.visual[present], task.text[present]
        return task.budget.smallest_for(schedules[present], visual, text, task.cost)

    smallest = smallest_for(task.whole(task.least))
    undecided = smallest_for(np.ones((len(task.visual), task.layers), dtype=np.int64))
    way_out = (
        'set first_cut="pre_llm" or set first_cut="peek", which prune before layer 0 sees every visual token '
        f"and are feasible down to {undecided.expression}"
        if undecided.value < smallest.value
        else ""
    )
    return InfeasibleBudget.too_small(
        task.budget,
        smallest,
        "the layers that are already decided and the least that every other layer must keep",
        way_out,
    )


def _unspendable(task: _Task, reason: str) -> InfeasibleBudget:
    return InfeasibleBudget(
        f"a budget of {task.budget} cannot be spent exactly over {task.layers} layers: {reason}; "
        "lower the budget, or raise the earlier cuts",
        task.budget,
    )


def _rows(weights: ArrayLike, num_visual: ArrayLike) -> tuple[Ints, Floats]:
    """N `[batch]` and the normalised curve `[batch, L]`, contiguous so that sums do not depend on
    memory layout.
    """
    visual = np.atleast_1d(np.asarray(num_visual, dtype=np.int64))
    curve = np.atleast_2d(np.ascontiguousarray(weights, dtype=np.float64))
    if (
        visual.ndim != 1
        or curve.ndim != 2
        or curve.shape[1] == 0
        or len(curve) not in (1, len(visual))
    ):
        raise ValueError(
            "weights must be [batch, L] and num_visual [batch] of the same batch size, "
            f"got shapes {list(np.shape(weights))} and {list(np.shape(num_visual))}"
        )
    if not (curve.min(initial=np.inf) > 0 and curve.max(initial=0.0) < np.inf):
        raise ValueError(
            "weights must be positive and finite; give every layer a small positive retention"
        )
    if len(curve) != len(visual):
        curve = np.repeat(curve, len(visual), axis=0)
    return visual, normalised(curve)


def _decided(fixed: ArrayLike | None, visual: Ints, text: Ints, layers: int) -> Ints:
    """The counts `[batch, F]` that are decided, F = 0 if none are."""
    batch = len(visual)
    if min(visual.min(initial=0), text.min(initial=0)) < 0:
        raise ValueError(
            "num_visual and num_text must not be negative, "
            f"got {visual.tolist()} and {text.tolist()}"
        )
    none = np.zeros((batch, 0), dtype=np.int64)
    decided = none if fixed is None else np.array(fixed, dtype=np.int64, ndmin=2)
    if decided.shape[0] != batch or decided.shape[1] > layers or text.shape != (batch,):
        raise ValueError(
            f"fixed must be [{batch}, at most {layers}] and num_text scalar or [{batch}], "
            f"got shapes {list(decided.shape)} and {list(text.shape)}"
        )
    falling = np.column_stack((visual, decided))
    if decided.min(initial=0) < 0 or (falling[:, 1:] > falling[:, :-1]).any():
        raise ValueError(
            "fixed must start at or below num_visual and never increase, "
            f"got {decided.tolist()} for num_visual {visual.tolist()}"
        )
    return decided
