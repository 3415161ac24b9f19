"""PyramidDrop: a staircase of cuts, each a fixed share of the one before."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any, ClassVar

import torch

from ..contract import Needs, Observation, PromptState
from ..parts.scorers import text_attention
from ..policy.budget import InfeasibleBudget
from ..policy.cost import DecoderCost
from ..policy.schedules import at_depth, check_size, fit_schedule, schedule_from_cuts
from .base import Planned

OFFICIAL_LAYERS, EARLY_LAYERS = (8.0, 16.0, 24.0), (2.0, 6.0, 15.0)
STEPS = 10_000
"""Settings per unit of lambda."""

OFFICIAL_SETTING = STEPS // 2


@dataclass(frozen=True)
class PDrop(Planned):
    """Keeps what the prompt's last token attends to, a fixed share of it at every step of a staircase.

    From the i-th of `layers` on, round(N lambda^i) tokens are left (at least 1). Each cut ranks by the
    head-mean attention of the last token in the layer behind the cut, computed ahead of that layer.
    lambda follows from the budget, in steps of 1/10000.
    Differs from the official code: there lambda is .5, tokens are counted by truncation, and the tokens
    that are left are numbered anew; here they keep their positions (`positions`).

    Args:
        budget: a `Budget`, or the mean number of visual tokens entering a layer.
        layers: the layers before which tokens are dropped, stated for 32 layers. None takes the official
            (8, 16, 24) where the budget pays for them with a lambda of .5 or more (about 47 % of the
            tokens), and else (2, 6, 15), the layers of published comparisons at smaller budgets.
    """

    name: ClassVar[str] = "pdrop"
    paper: ClassVar[str] = (
        "PyramidDrop: Accelerating Your Large Vision-Language Models via Pyramid Visual Redundancy "
        "Reduction, CVPR 2025, arxiv.org/abs/2410.17247"
    )
    released: ClassVar[Mapping[str, Any]] = {"positions": "compacted"}
    looks: ClassVar[Needs] = Needs(rows="last", ahead=True)

    layers: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layers is None:
            return
        layers = tuple(self.layers) if isinstance(self.layers, (tuple, list)) else ()
        numbers = bool(layers) and all(isinstance(layer, (int, float)) for layer in layers)
        if not numbers or not all(a < b for a, b in pairwise((0, *layers, 32))):
            raise ValueError(
                "layers must be a tuple of rising numbers above 0 and below 32 (they are stated for "
                f"32 layers), got {self.layers!r}; for instance (2, 6, 15)"
            )
        object.__setattr__(self, "layers", layers)

    def plan(
        self, num_layers: int, num_visual: int, num_text: int = 0, cost: DecoderCost | None = None
    ) -> list[int]:
        check_size(num_layers, num_visual, num_text)
        if self.layers is not None or not num_visual:
            return super().plan(num_layers, num_visual, num_text, cost)
        official = partial(
            replace(self, layers=OFFICIAL_LAYERS).shape,
            num_visual=num_visual,
            num_layers=num_layers,
        )
        settings = range(OFFICIAL_SETTING, STEPS + 1)
        try:
            return fit_schedule(official, settings, num_visual, self.budget, cost, num_text)
        except InfeasibleBudget:
            early = replace(self, layers=EARLY_LAYERS)
            return early.plan(num_layers, num_visual, num_text, cost)

    def capacity(
        self, num_layers: int, num_visual: int, num_text: int = 0, cost: DecoderCost | None = None
    ) -> list[int]:
        size = (num_layers, num_visual, num_text, cost)
        if self.layers is not None or self.budget.kind in ("tokens", "ratio"):
            return self.plan(*size)
        # More text may tip the choice to the early layers, which leave more tokens to the last ones.
        early = replace(self, layers=EARLY_LAYERS).plan(*size)
        return list(map(max, self.plan(*size), early))

    def shape(self, setting: int, num_visual: int, num_layers: int) -> list[int]:
        assert self.layers is not None
        cuts = [at_depth(layer, num_layers) for layer in self.layers]
        shares = [(setting / STEPS) ** (i + 1) for i in range(len(cuts))]
        levels = [max(1, round(num_visual * share)) for share in shares]
        return schedule_from_cuts(num_visual, num_layers, cuts, levels)

    def settings(self, num_visual: int, num_layers: int) -> range:
        return range(STEPS + 1)

    def score(self, seen: Observation, state: PromptState) -> torch.Tensor:
        return text_attention(seen)
