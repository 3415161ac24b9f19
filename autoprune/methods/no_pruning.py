"""No pruning: the model as it is, recorded as the methods are."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from ..contract import Needs, Observation, PromptState, Tower
from ..policy.budget import Budget
from .base import Method


@dataclass(frozen=True)
class NoPruning(Method):
    """Keeps every visual token: what the methods are compared with, and what being attached costs.

    It is none of the pruning methods that `list_methods` names.

    Args:
        sees: what it looks at in the vision tower.
    """

    name: ClassVar[str] = "no_pruning"
    paper: ClassVar[str] = "none: the whole picture"

    budget: Budget = field(default_factory=lambda: Budget.ratio(1))
    sees: Tower = field(default_factory=Tower)

    def tower(self) -> Tower:
        return self.sees

    def needs(self, cut: int, state: PromptState) -> Needs | None:
        return None

    def select(self, seen: Observation, state: PromptState) -> None:
        """Never asked."""
