"""Budgets over several prompts, for a method that measures each prompt's signals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ..contract import PromptState
from ..policy.adaptive import AdaptiveSchedule, Sizes
from ..policy.budget import Budget
from ..policy.demand import Demand, plan_batch
from ..policy.fleet import Fleet
from ..policy.information import visual_spread
from ..policy.rules import QUESTION, InformationRule, Signals


def check_fleet(budget: Budget, fleet: Any) -> None:
    """Raise ValueError unless this fleet, or None, goes with the budget."""
    if fleet is not None and not isinstance(fleet, Fleet):
        raise ValueError(f"fleet must be an autoprune.Fleet or None, got {fleet!r}")
    if fleet is None and budget.over == "stream":
        raise ValueError(
            f"{budget.expression} needs a fleet, which knows what earlier prompts have saved; add fleet=Fleet()"
        )
    if fleet is not None and budget.over == "prompt":
        raise ValueError(
            f"a fleet shares a budget over prompts, and {budget.expression} is one of each prompt; add "
            'over="batch" or over="stream" to it, or leave out the fleet'
        )


def plan_shared(
    schedule: AdaptiveSchedule,
    fleet: Fleet | None,
    sizes: Sizes,
    information: Sequence[float],
    others: Sequence[Sequence[float]],
    state: PromptState,
) -> np.ndarray:
    """The schedules [prompts, L] of a batch whose budget is shared; a stream's booking waits for `end_booking`.

    Args:
        sizes: of all prompts. information: bits.
        others: of each prompt, what `other_signals` gives.
    """
    copies = state.prompts.repeats
    rows = [row for row in range(0, len(sizes.num_visual), copies) if sizes.num_visual[row]]
    plan = np.zeros((len(sizes.num_visual), sizes.num_layers), dtype=np.int64)
    own = Sizes(
        sizes.num_layers,
        tuple(sizes.num_visual[row] for row in rows),
        tuple(sizes.num_text[row] for row in rows),
        sizes.cost,
    )
    signals = _signals(
        schedule, own, [information[row] for row in rows], [others[row] for row in rows]
    )
    prompts = Demand.of(schedule, own, [information[row] for row in rows], signals, copies)
    if schedule.budget.over == "stream":
        assert fleet is not None
        shared, state.notes["booking"] = fleet.plan(prompts)
    else:
        shared = plan_batch(prompts, InformationRule() if fleet is None else fleet.rule)
    for row, counts in zip(rows, shared, strict=True):
        plan[row : row + copies] = counts
    return plan


def other_signals(
    attention: torch.Tensor,
    hidden: torch.Tensor,
    text_mask: torch.Tensor | None,
    visual_mask: torch.Tensor | None,
) -> torch.Tensor:
    """What `plan_shared` must know of each prompt beside its information, float32 [batch, 2 + QUESTION].

    First `visual_spread`, then `Signals.question`. On the device: nothing waits.

    Args:
        attention, text_mask, visual_mask: as for `mutual_information`.
        hidden: [batch, text, hidden size], of the same text rows.
    """
    states = hidden.to(attention.device, torch.float32)
    if text_mask is None:
        mean = states.mean(dim=1)
    else:
        real = text_mask[..., None]
        mean = states.where(real, 0.0).sum(dim=1) / real.sum(dim=1).clamp_min(1)
    question = torch.nn.functional.adaptive_avg_pool1d(mean[:, None], QUESTION)[:, 0]
    return torch.cat((visual_spread(attention, text_mask, visual_mask).float(), question), dim=1)


def end_booking(fleet: Fleet | None, state: PromptState, done: bool) -> None:
    """Settle what a prefill has booked, once."""
    booking = state.notes.pop("booking", None)
    if fleet is not None and booking is not None:
        fleet.settle(booking, done)


def _signals(
    schedule: AdaptiveSchedule,
    sizes: Sizes,
    information: Sequence[float],
    others: Sequence[Sequence[float]],
) -> list[Signals]:
    means = schedule.before_measuring(sizes)[:, schedule.mi_layer + 1 :].mean(axis=1).tolist()
    measured = zip(information, others, sizes.num_visual, sizes.num_text, means, strict=True)
    return [
        # Attention that overflowed tells nothing: as if it were everywhere.
        Signals(
            bits,
            participation if math.isfinite(participation) else float(visual),
            entropy if math.isfinite(entropy) else math.log2(visual),
            visual,
            text,
            mean,
            tuple(number if math.isfinite(number) else 0.0 for number in question),
        )
        for bits, (participation, entropy, *question), visual, text, mean in measured
    ]
