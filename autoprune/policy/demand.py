"""What the prompts of one prefill ask of a budget that they share, and how a batch shares it.

The first layers of every prompt follow its own allowance, as nothing is known of it yet. When its signals are
measured, what is left for the other layers, the open ones, is distributed: in a batch at once, in a stream with
the help of a `Fleet`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from .adaptive import AdaptiveSchedule, Sizes
from .allocation import LossCurve, share_sum
from .rules import Rule, Signals, predicted

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Demand:
    """The prompts of one prefill that share a budget, each of them once.

    sizes: all with visual tokens. information: bits, which the schedules follow.
    copies: how often each runs, as for beams; each copy spends the same.
    """

    schedule: AdaptiveSchedule
    sizes: Sizes
    information: Sequence[float]
    signals: Sequence[Signals]
    allowed: Ints
    copies: int = 1

    @classmethod
    def of(
        cls,
        schedule: AdaptiveSchedule,
        sizes: Sizes,
        information: Sequence[float],
        signals: Sequence[Signals],
        copies: int = 1,
    ) -> Demand:
        allowed = schedule.budget.allowed(
            sizes.num_layers, sizes.num_visual, sizes.num_text, sizes.cost
        )
        return cls(schedule, sizes, information, signals, allowed, copies)

    def alone(self, prompt: int) -> Demand:
        """One of the prompts."""
        sizes, own = self.sizes, slice(prompt, prompt + 1)
        return replace(
            self,
            sizes=replace(sizes, num_visual=sizes.num_visual[own], num_text=sizes.num_text[own]),
            information=self.information[own],
            signals=self.signals[own],
            allowed=self.allowed[own],
        )

    @property
    def without_visual(self) -> Ints:
        """What each prompt's text costs, [prompts]."""
        return self.spent(np.zeros((len(self.allowed), self.sizes.num_layers), dtype=np.int64))

    def spent(self, plan: Ints) -> Ints:
        """What schedules [prompts, L] cost, [prompts]."""
        spent: Ints = self.schedule.budget.spent(plan, self.sizes.num_text, self.sizes.cost)
        return spent

    def solve(self, shares: Ints) -> Ints:
        """The schedules [prompts, L] that spend these shares."""
        return self.schedule.after_measuring(self.sizes, self.information, shares)

    def curves(self, rule: Rule) -> list[LossCurve]:
        """What a rule predicts that each prompt loses, by its cost."""
        tokens = _candidates(max(self.sizes.num_visual))
        losses = predicted(rule, self.signals, tokens)
        least, most = self.schedule.range_after_measuring(self.sizes)
        costs = self._costs(tokens)
        limits = zip(least.tolist(), most.tolist(), strict=True)
        return [
            LossCurve.of(cost, loss, *limit)
            for cost, loss, limit in zip(costs, losses, limits, strict=True)
        ]

    def _costs(self, tokens: Floats) -> Floats:
        """What prompts cost with so many visual tokens in every open layer, [prompts, candidates]."""
        cost, kind, plan = (
            self.sizes.cost,
            self.schedule.budget.kind,
            self.schedule.decided(self.sizes),
        )
        open_layers = self.sizes.num_layers - plan.shape[1]
        whole = np.pad(plan, ((0, 0), (0, open_layers)))
        if kind in ("tokens", "ratio"):
            more = tokens[None]
        elif kind == "kv_bytes":
            assert cost is not None
            more = cost.kv_bytes_per_token * tokens[None]
        else:
            assert cost is not None
            text = np.array(self.sizes.num_text)[:, None]
            more = cost.linear_flops * tokens + cost.attention_flops * (tokens + 2 * text) * tokens
        return self.spent(whole)[:, None] + open_layers * more


def plan_batch(prompts: Demand, rule: Rule) -> Ints:
    """Schedules [prompts, L] that spend together what the prompts may spend each for itself.

    Raises:
        ValueError: the rule gives no table of losses.
    """
    total = sum(prompts.allowed.tolist())
    shares = prompts.allowed
    if len(shares) > 1:
        shares = share_sum(prompts.curves(rule), total)
    plan = prompts.solve(shares)
    return plan if prompts.schedule.budget.exact else _spend_rest(prompts, plan, total)


def _spend_rest(prompts: Demand, plan: Ints, total: int) -> Ints:
    """The same schedules with what they leave of the sum, as far as it pays for further tokens.

    Whoever got most comes first, as its rule thinks it the neediest.
    """
    plan, spent = plan.copy(), prompts.spent(plan)
    most = prompts.schedule.range_after_measuring(prompts.sizes)[1]
    rest, changed = total - sum(spent.tolist()), True
    cost = prompts.sizes.cost
    assert cost is not None
    priced = prompts.schedule.budget.kind == "flops"
    # No token is cheaper than the first one of a layer without text.
    cheapest = cost.linear_flops + cost.attention_flops if priced else cost.kv_bytes_per_token
    while changed:
        changed = False
        for prompt in np.argsort(-spent, kind="stable").tolist():
            if rest < cheapest:
                return plan
            offered = np.minimum(spent[prompt] + rest, most[prompt : prompt + 1])
            alone = prompts.alone(prompt)
            tried = alone.solve(offered)
            more = int(alone.spent(tried)[0] - spent[prompt])
            if more > 0:
                plan[prompt], changed = tried[0], True
                spent[prompt] += more
                rest -= more
    return plan


def _candidates(largest: int) -> Floats:
    """Numbers of tokens that rules are asked about: from 1 to `largest`, eight to each doubling."""
    return np.unique(np.append(np.exp2(np.arange(0, 8 * math.log2(largest)) / 8), largest))
