"""What takes turns in a round: the plain model, the methods, and what is left of pruning when nothing
is pruned.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import numpy as np
import torch

from ..contract import Needs, Observation, Prompts, PromptState, Selection, Tower
from ..methods.autoprune import AutoPrune
from ..methods.base import Method
from ..methods.no_pruning import NoPruning
from ..policy.budget import Budget
from ..policy.cost import DecoderCost

Kind = Literal["plain", "pruned", "overhead"]

PLAIN = "plain"
OVERHEADS = ("hooks only", "budget of all tokens", "decisions only", "cuts only")


@dataclass(frozen=True)
class Variant:
    """One way to run the model; `method` is None for the plain one."""

    label: str
    method: Method | None = None

    @property
    def kind(self) -> Kind:
        if self.method is None:
            return "plain"
        return "overhead" if self.label in OVERHEADS else "pruned"


@dataclass(frozen=True)
class DecideOnly(Method):
    """Lets a method see and decide every cut, and drops nothing.

    Later cuts are then decided over all visual tokens, not over those that are left, so this costs
    somewhat more than the same decisions do while pruning.
    """

    name: ClassVar[str] = "decide only"
    paper: ClassVar[str] = ""

    method: Method

    @property
    def budget(self) -> Budget:  # type: ignore[override]
        return self.method.budget

    def tower(self) -> Tower:
        return dataclasses.replace(self.method.tower(), merge=False)

    def begin(self, state: PromptState) -> None:
        self.method.begin(state)

    def needs(self, cut: int, state: PromptState) -> Needs | None:
        return self.method.needs(cut, state)

    def select(self, seen: Observation, state: PromptState) -> Selection | None:
        self.method.select(seen, state)
        return None


@dataclass(frozen=True)
class Replay(Method):
    """Cuts to given counts at once, by position: the price of shorter layers without any decision.

    Args:
        schedule: visual tokens entering each layer, one tuple per prompt.
    """

    name: ClassVar[str] = "replay"
    paper: ClassVar[str] = ""

    schedule: tuple[tuple[int, ...], ...]
    budget: Budget = field(default_factory=lambda: Budget.ratio(1))

    def needs(self, cut: int, state: PromptState) -> Needs | None:
        before = [counts[cut - 1] for counts in self.schedule] if cut else state.prompts.num_visual
        due = any(new < old for new, old in zip(self._counts(cut), before, strict=True))
        return Needs() if due else None

    def select(self, seen: Observation, state: PromptState) -> Selection:
        counts = self._counts(seen.cut)
        place = torch.arange(max(counts), device=seen.index.device).repeat(len(counts), 1)
        number = torch.as_tensor(counts).to(place.device)
        return Selection(place.masked_fill(place >= number[:, None], -1), counts)

    def _counts(self, cut: int) -> list[int]:
        return [counts[cut] for counts in self.schedule]


@dataclass(frozen=True)
class SpreadAutoPrune(AutoPrune):
    """AutoPrune whose prompts of one batch get curves that differ, whatever was measured.

    Random weights look at all prompts alike, which would make every batch even and flatter the
    speed. The mutual information is measured as always, and then replaced by values from `low` to
    `high` bits, evenly spaced over the batch. A single prompt keeps its own.
    """

    low: float = 0.0
    high: float = 1.0

    def _posterior(
        self,
        num_layers: int,
        prompts: Prompts,
        cost: DecoderCost | None,
        prior: np.ndarray,
        information: Sequence[float],
    ) -> np.ndarray:
        if len(prompts) > 1:
            information = np.linspace(self.low, self.high, len(prompts)).tolist()
        return super()._posterior(num_layers, prompts, cost, prior, information)


def spread_curves(method: Method, bits: float) -> Method:
    """AutoPrune as `SpreadAutoPrune`, unless `bits` is 0; every other method as it is."""
    if type(method) is not AutoPrune or not bits:
        return method
    fields: dict[str, Any] = {
        field.name: getattr(method, field.name) for field in dataclasses.fields(method)
    }
    return SpreadAutoPrune(**fields, high=bits)


def overheads(
    keeps_all: Method, prunes: Method, schedule: Sequence[Sequence[int]]
) -> list[Variant]:
    """What pruning costs without what it saves, and the other way round.

    Args:
        keeps_all: a method whose budget pays for all visual tokens.
        prunes: the method whose decisions are looked at; schedule: the counts it came to, per prompt.
    """
    methods = (
        NoPruning(),
        keeps_all,
        DecideOnly(prunes),
        Replay(tuple(tuple(counts) for counts in schedule)),
    )
    return [Variant(*pair) for pair in zip(OVERHEADS, methods, strict=True)]
