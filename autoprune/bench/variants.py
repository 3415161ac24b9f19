"""What takes turns in a round: the plain model, the methods, and what is left of pruning when nothing
is pruned.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import numpy as np

from ..contract import Needs, Observation, PromptState, Selection, Tower
from ..methods.autoprune import AutoPrune
from ..methods.base import Method
from ..parts.transfer import all_to_device
from ..policy.budget import Budget

Kind = Literal["plain", "pruned", "overhead"]

PLAIN = "plain"
HOOKS = "hooks only"
OVERHEADS = (HOOKS, "budget of all tokens", "decisions only", "cuts only")


@dataclass(frozen=True)
class Variant:
    """One way to run the model.

    method: None for the plain one.
    of: for an overhead, the label of the method whose it is; being attached costs all of them the same.
    """

    label: str
    method: Method | None = None
    of: str | None = None

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
        if "kept" not in state.notes:
            # All at once: a copy in every cut would cost more than the cut.
            each = [self._kept(cut) for cut in range(len(self.schedule[0]))]
            state.notes["kept"] = all_to_device(each, seen.index.device)
        return Selection(state.notes["kept"][seen.cut], self._counts(seen.cut))

    def _kept(self, cut: int) -> np.ndarray:
        counts = np.array(self._counts(cut))
        position = np.arange(counts.max())
        return np.where(position < counts[:, None], position, -1)

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

    def _information_for_schedule(self, measured: list[float]) -> list[float]:
        if len(measured) == 1:
            return measured
        return np.linspace(self.low, self.high, len(measured)).tolist()


def spread_curves(method: Method, bits: float) -> Method:
    """AutoPrune as `SpreadAutoPrune`, unless `bits` is 0; every other method as it is."""
    if type(method) is not AutoPrune or not bits:
        return method
    fields: dict[str, Any] = {
        field.name: getattr(method, field.name) for field in dataclasses.fields(method)
    }
    return SpreadAutoPrune(**fields, high=bits)


def overheads(
    keeps_all: Variant, prunes: Variant, schedule: Sequence[Sequence[int]]
) -> list[Variant]:
    """What a method costs without what it saves, and the other way round.

    Args:
        keeps_all: the method with a budget that pays for all visual tokens.
        prunes: the same with the budget that is looked at; schedule: the counts it came to, per prompt.
    """
    assert prunes.method is not None
    methods = (
        keeps_all.method,
        DecideOnly(prunes.method),
        Replay(tuple(map(tuple, schedule))),
    )
    return [
        Variant(overhead, method, of=prunes.label)
        for overhead, method in zip(OVERHEADS[1:], methods, strict=True)
    ]
