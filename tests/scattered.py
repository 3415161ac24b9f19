"""A method for tests: random tokens, and for every prompt a schedule of its own."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch

from autoprune.contract import Needs, Observation, Positions, Prompts, PromptState, Selection
from autoprune.methods.base import Method
from autoprune.parts.selectors import top_k
from autoprune.policy.budget import Budget

Shares = Mapping[int, float]

# What is left of the visual tokens from a cut on. One prompt stays whole, one loses all its tokens.
DEEP: tuple[Shares, ...] = ({1: 0.75, 2: 0.5, 4: 0.25}, {}, {2: 0.6, 5: 0.1})
PRE_LLM: tuple[Shares, ...] = ({0: 0.5, 3: 0.25}, {3: 0.0}, {0: 0.25})


@dataclass(frozen=True)
class Scattered(Method):
    """Keeps random visual tokens; which ones, and how many, depends on the prompt alone.

    schedules: maps from a cut to the share of the tokens left after it. Each prompt follows one,
        chosen by the prompt's length, so that copies of a prompt (beams) are treated alike.
    """

    name: ClassVar[str] = "scattered"
    paper: ClassVar[str] = "none"

    schedules: tuple[Shares, ...] = DEEP
    seed: int = 0
    positions: Positions = "original"
    budget: Budget = field(default_factory=lambda: Budget.ratio(1.0))

    def needs(self, cut: int, state: PromptState) -> Needs | None:
        return Needs() if any(cut in shares for shares in self.schedules) else None

    def select(self, seen: Observation, state: PromptState) -> Selection | None:
        counts = [
            self.left(seen.cut, prompt, now, state.prompts)
            for prompt, now in enumerate(seen.counts)
        ]
        generator = torch.Generator().manual_seed(self.seed)
        table = torch.rand(4096, generator=generator)
        scores = table[seen.index.clamp(min=0)]
        return Selection(top_k(scores, counts, seen.mask), counts)

    def left(self, cut: int, prompt: int, now: int, prompts: Prompts) -> int:
        """Visual tokens of a prompt after the cut."""
        total = prompts.num_visual[prompt]
        length = total + prompts.num_text[prompt]
        shares = self.schedules[length % len(self.schedules)]
        return min(now, math.ceil(shares[cut] * total)) if cut in shares else now
