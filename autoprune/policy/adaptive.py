"""From a prompt's mutual information to its schedule.

With I bits, the retention of layer l follows a curve with

    slope     max(k0 - gamma I, 0)
    midpoint  x0 + beta I

both stated for 32 layers. The solver scales it so that the schedule spends the budget. The layers up to the one
where I is measured are decided before, by a curve that knows nothing of I.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .budget import Budget
from .cost import DecoderCost
from .curves import get_curve, straight
from .envelope import envelope
from .layer_groups import LayerGroups
from .schedules import REFERENCE_DEPTH
from .solver import solve_schedule
from .time_model import Decision, DeviceSpeed, Prefill, choose_cut_every

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

REMEMBERED_SIZES = 256

POINTS = 65
"""Where `AdaptiveSchedule.capacity` looks at the curves; more points tighten the bound between them."""

CUT_EVERY = (1, 2, 4, 8, 16)
"""What `decide_cut_every` chooses from, beside one group of all layers."""


@dataclass(frozen=True)
class Sizes:
    """The prompts of a batch, and the decoder that reads them.

    Args:
        num_layers: L.
        num_visual, num_text: visual and other tokens of each prompt, [prompts].
        cost: the decoder's cost; needed for FLOPs and KV budgets.
    """

    num_layers: int
    num_visual: tuple[int, ...]
    num_text: tuple[int, ...]
    cost: DecoderCost | None = None


@dataclass(frozen=True)
class AdaptiveSchedule:
    """How information decides schedules under a budget.

    Args:
        budget: what each prompt may spend.
        k0, gamma, x0, beta: of slope and midpoint, see above.
        curve: retention family, see `curves.CURVES`.
        mi_layer: the layer whose attention is measured; -1 if that is seen before layer 0 runs, so that I
            decides all layers.
        prior: what the layers up to it follow: "curve", the curve of a prompt without information, or "linear",
            a straight line over depth.
        cut_every: layers that share a cut, from the second layer behind the measurement on.
        layer_0_is_full: no cut before layer 0, so that it sees all tokens.
    """

    budget: Budget
    k0: float
    gamma: float
    x0: float
    beta: float
    curve: str
    mi_layer: int
    prior: Literal["curve", "linear"]
    cut_every: int
    layer_0_is_full: bool

    def before_measuring(self, sizes: Sizes) -> Ints:
        """The schedules [prompts, L] as long as I is unknown. They decide the layers up to `mi_layer`."""
        if self.budget.exact:
            # Neither text nor cost matters, so that more prompts share what is remembered.
            sizes = Sizes(sizes.num_layers, sizes.num_visual, (0,) * len(sizes.num_visual))
        return _before_measuring(self, sizes)

    def after_measuring(
        self, sizes: Sizes, information: Sequence[float], allowed: ArrayLike | None = None
    ) -> Ints:
        """The schedules [prompts, L] for each prompt's information in bits.

        Args:
            allowed: as for `solve_schedule`, between what `range_after_measuring` gives.
        """
        retained = self.retention(sizes.num_layers, information)
        return self._solve(retained, sizes, self.decided(sizes), allowed)

    def range_after_measuring(self, sizes: Sizes) -> tuple[Ints, Ints]:
        """The least and the most that each prompt can spend when I is known, [prompts] each.

        The layers up to `mi_layer` are decided by then. Behind them at least one token stays, and at most what
        entered the last of them. The unit is that of `Budget.allowed`.
        """
        decided = self.decided(sizes)
        entered = np.column_stack((sizes.num_visual, decided))[:, -1:]
        last = np.repeat(entered, sizes.num_layers - decided.shape[1], axis=1)
        least, most = (
            self.budget.spent(np.concatenate((decided, rest), axis=1), sizes.num_text, sizes.cost)
            for rest in (np.minimum(last, 1), last)
        )
        return least, most

    def decided(self, sizes: Sizes) -> Ints:
        """What enters the layers up to `mi_layer`, [prompts, mi_layer + 1].

        Where tokens are counted that leave a layer, what enters layer 0 is decided in any case: all of them.
        """
        counts_entering = self.budget.counted == "entering"
        return self.before_measuring(sizes)[:, : max(self.mi_layer + 1, not counts_entering)]

    def retention(self, num_layers: int, information: Sequence[float]) -> Floats:
        """The curve before normalisation, [prompts, L], for each prompt's information in bits."""
        slope, midpoint = self._slope_and_midpoint(num_layers, information)
        retained = get_curve(self.curve)(np.arange(num_layers), slope, midpoint)
        return self._groups.average(retained)

    def capacity(self, sizes: Sizes, most_information: float) -> list[int]:
        """At least what any information from 0 to `most_information` bits gives each layer, [L].

        Under a budget over a batch or a stream this is what is decided before I is known, and behind it all
        that is left there.

        Args:
            sizes: of one prompt.

        Raises:
            InfeasibleBudget: the budget cannot be met.
        """
        layers = sizes.num_layers
        if self.budget.over != "prompt":
            # One prompt may get what all others save.
            decided = self.decided(sizes)[0].tolist()
            return decided + [[*sizes.num_visual, *decided][-1]] * (layers - len(decided))
        slopes, midpoints = self._slope_and_midpoint(layers, self._path(most_information))
        room = envelope(
            get_curve(self.curve),
            slopes,
            midpoints,
            sizes.num_visual[0],
            self.budget,
            self.decided(sizes),
            layers,
            sizes.cost,
            sizes.num_text[0],
            transform=self._groups.average,
        )
        if self._levels:
            last, most = self._groups.last_alone(layers), self._groups.most_left_over(layers)
            room[last] = min(room[last] + most, room[last - 1])
        return room

    def _path(self, most: float) -> Floats:
        """Ascending points over all information, in bits.

        From where the slope reaches 0 on, the curve stays as it is. The midpoint changes its sign at `turn`.
        """
        flat = min(self.k0 / self.gamma, most) if self.gamma > 0 else most
        turn = -self.x0 / self.beta if self.beta else 0.0
        return np.unique(np.clip([*np.linspace(0, flat, POINTS), turn, most], 0, most))

    def _slope_and_midpoint(self, num_layers: int, bits: ArrayLike) -> tuple[Floats, Floats]:
        """For each mutual information, in layers of this model."""
        information = np.asarray(bits, dtype=np.float64)
        slope = np.maximum(self.k0 - self.gamma * information, 0.0)
        midpoint = self.x0 + self.beta * information
        return slope * (REFERENCE_DEPTH / num_layers), midpoint * (num_layers / REFERENCE_DEPTH)

    def _solve(
        self,
        retained: Floats,
        sizes: Sizes,
        decided: Ints | None,
        allowed: ArrayLike | None = None,
    ) -> Ints:
        """The schedules [prompts, L] that follow the curves and spend the budget."""
        counts = solve_schedule(
            retained,
            sizes.num_visual,
            self.budget,
            cost=sizes.cost,
            num_text=sizes.num_text,
            fixed=decided,
            allowed=allowed,
        )
        return self._groups.level(counts) if self._levels else counts

    @property
    def _groups(self) -> LayerGroups:
        """Up to the first layer behind the measurement, and up to layer 1, layers stand alone."""
        return LayerGroups(max(self.mi_layer + 2, 2), self.cut_every)

    @property
    def _levels(self) -> bool:
        """Whether tokens may move between layers, as each costs the same in all of them."""
        even = self.budget.kind != "flops" and self.budget.counted == "entering"
        return self.cut_every > 1 and even


@functools.lru_cache(maxsize=REMEMBERED_SIZES)
def _before_measuring(schedule: AdaptiveSchedule, sizes: Sizes) -> Ints:
    """The same for all pictures and questions of one size, so it is worth remembering."""
    if schedule.prior == "linear":
        retained = schedule._groups.average(straight(sizes.num_layers)[None])
    else:
        retained = schedule.retention(sizes.num_layers, [0.0])
    decided = np.asarray(sizes.num_visual)[:, None] if schedule.layer_0_is_full else None
    plan = schedule._solve(retained, sizes, decided)
    plan.flags.writeable = False
    return plan


def falls(schedules: Ints, num_visual: Sequence[int]) -> list[bool]:
    """Before which layers a cut is due: where fewer tokens enter of any prompt, [L].

    Args:
        schedules: [prompts, L]. num_visual: N of each prompt.
    """
    before = np.column_stack([num_visual, schedules[:, :-1]])
    return list(np.asarray((schedules < before).any(axis=0)).tolist())


@functools.lru_cache(maxsize=REMEMBERED_SIZES)
def decide_cut_every(
    schedule: AdaptiveSchedule, sizes: Sizes, speed: DeviceSpeed, rank_every: int = 1
) -> Decision:
    """How many layers should share a cut on this device, or that pruning does not pay.

    One decision for the batch, by its total FLOPs. As the information is not known yet, it is taken as 0 bits:
    the steepest curve, unless gamma is negative, and so the longest prefill. A budget of bytes is kept
    whatever the time, as it is there to save memory. So is one over a batch or a stream, as a whole prompt
    would spend what it does not have.

    Args:
        schedule: with any `cut_every`.
        sizes: with the decoder's cost.
        rank_every: layers that follow one ranking, from the measurement on.
    """
    choices = {min(every, sizes.num_layers) for every in (*CUT_EVERY, sizes.num_layers)}
    plain = np.repeat(np.asarray(sizes.num_visual)[:, None], sizes.num_layers, axis=1)
    return choose_cut_every(
        _prefill(plain, sizes),
        {
            every: _pruned(replace(schedule, cut_every=every), sizes, rank_every)
            for every in choices
        },
        speed,
        must_prune=schedule.budget.kind == "kv_bytes" or schedule.budget.over != "prompt",
    )


def _pruned(schedule: AdaptiveSchedule, sizes: Sizes, rank_every: int) -> Prefill:
    plan = schedule.after_measuring(sizes, [0.0] * len(sizes.num_visual))
    cuts = [layer for layer, due in enumerate(falls(plan, sizes.num_visual)) if due]
    # The look at the attention that measures I ranks, too, whether tokens are cut there or not.
    ranked, until = 0, 0
    for layer in sorted({*cuts, schedule.mi_layer + 1}):
        if layer >= until:
            ranked, until = ranked + 1, layer + (rank_every if layer > schedule.mi_layer else 1)
    return _prefill(plan, sizes, len(cuts), ranked)


def _prefill(schedules: Ints, sizes: Sizes, cuts: int = 0, rankings: int = 0) -> Prefill:
    """The prefill with these schedules [prompts, L]."""
    assert sizes.cost is not None
    tokens = schedules + np.asarray(sizes.num_text)[:, None]
    flops = sizes.cost.layer_flops(tokens).sum(axis=0)
    return Prefill(tuple(flops.tolist()), cuts, rankings)
