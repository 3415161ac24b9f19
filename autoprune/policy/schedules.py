"""Schedules of fixed shape, and the member of such a family that a budget pays for.

A schedule is the list n_0..n_{L-1} of visual tokens that enter each decoder layer. Most methods have
one of fixed shape with a single free number (tokens kept, or a ratio); under a budget that number
follows from the price. Of what the budget allows (`Budget.allowed`), a shape may be unable to spend all: then
the nearest schedule below is taken.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from numbers import Integral, Real
from typing import Any

from .budget import Budget, InfeasibleBudget
from .cost import DecoderCost

REFERENCE_DEPTH = 32


def at_depth(layer: float, num_layers: int) -> int:
    """The cut of a model of `num_layers` layers that stands at cut `layer` of 32 layers, at least 1."""
    return max(1, math.ceil(layer * num_layers / REFERENCE_DEPTH - 0.5))


def schedule_from_cuts(
    num_visual: int, num_layers: int, cuts: Sequence[int], levels: Sequence[int]
) -> list[int]:
    """All visual tokens up to the first cut, `levels[i]` from cut `cuts[i]` on.

    Args:
        cuts: ascending; cut l makes layer l and those behind it see fewer tokens. Of equal cuts, and
            of cuts behind the last layer, only the first ones' effect is seen.
        levels: never rising, none above `num_visual`.
    """
    schedule, level = [], num_visual
    steps = dict(reversed(list(zip(cuts, levels, strict=True))))
    for layer in range(num_layers):
        level = min(level, steps.get(layer, level))
        schedule.append(level)
    return schedule


def check_size(num_layers: Any, num_visual: Any, num_text: Any = 0) -> None:
    """Raise ValueError unless a prompt of this size can be planned.

    Args:
        num_layers: L, a whole number, at least 1.
        num_visual, num_text: tokens of the prompt, whole numbers, at least 0.
    """
    for name, value, least in (
        ("num_layers", num_layers, 1),
        ("num_visual", num_visual, 0),
        ("num_text", num_text, 0),
    ):
        whole = isinstance(value, Integral) and not isinstance(value, bool)
        if not whole or value < least:
            raise ValueError(
                f"{name} must be a whole number, {least} or more, got {value!r}; "
                "plan(num_layers=32, num_visual=576) plans LLaVA-1.5-7B"
            )


def check_information(bits: Any) -> None:
    """Raise ValueError unless `bits` can be a mutual information: finite and at least 0."""
    number = isinstance(bits, Real) and not isinstance(bits, bool)
    if not number or not 0 <= bits < math.inf:
        raise ValueError(
            f"mutual_information must be a number of bits, finite and 0 or more, got {bits!r}; "
            "what a prompt has is in trace.samples[0].mutual_information"
        )


def fit_schedule(
    shape: Callable[[int], list[int]],
    settings: range,
    num_visual: int,
    budget: Budget,
    cost: DecoderCost | None = None,
    num_text: int = 0,
) -> list[int]:
    """The costliest schedule of a family that the budget pays for.

    Args:
        shape: the schedule at a setting; in no layer does it fall as the setting rises.
        settings: from the cheapest to the costliest one.
        num_visual: N of the prompt.
        cost, num_text: the decoder's cost and the prompt's other tokens, for FLOPs and KV budgets.

    Raises:
        InfeasibleBudget: not even the cheapest setting fits; the message names the smallest budget.
        ValueError: a FLOPs or KV budget without `cost`.
    """

    cheapest = shape(settings[0])
    allowed = budget.allowed(len(cheapest), num_visual, num_text, cost)

    def affordable(setting: int) -> bool:
        return bool(budget.spent(shape(setting), num_text, cost) <= allowed)

    if not affordable(settings[0]):
        smallest = budget.smallest_for(cheapest, num_visual, num_text, cost)
        named = f"the cheapest schedule of this method, {_short(cheapest)}"
        raise InfeasibleBudget.too_small(budget, smallest, named)
    low, high = 0, len(settings) - 1
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if affordable(settings[middle]) else (low, middle - 1)
    return shape(settings[low])


def _short(schedule: Sequence[int]) -> str:
    falls = [i for i in range(1, len(schedule)) if schedule[i] < schedule[i - 1]]
    return " then ".join(
        [f"{schedule[0]} tokens", *(f"{schedule[i]} from layer {i} on" for i in falls)]
    )
