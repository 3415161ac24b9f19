"""Random pruning: the floor that every method has to beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from ..budget import Budget, solve_schedule
from ..method import Method, Needs, Observation, PromptState, Selection
from ..selectors import top_k


@dataclass(frozen=True)
class Random(Method):
    """Keeps visual tokens at random, the same number in every layer, cut before the decoder.

    Where the budget's sum is not a multiple of the depth, the shallower layers keep one token more.
    The k-th prompt of a batch always gets the k-th draw of the seed.

    Args:
        budget: a `Budget`, or the mean number of visual tokens entering a layer.
        seed: which tokens.
    """

    name: ClassVar[str] = "random"
    paper: ClassVar[str] = "none: the floor that every method has to beat"

    budget: Budget | float = 64
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "budget", Budget.of(self.budget))

    def begin(self, state: PromptState) -> None:
        prompts, layers = state.prompts, state.shape.num_layers
        plan = solve_schedule(
            np.ones((len(prompts), layers)),
            prompts.num_visual,
            self.budget,
            cost=state.shape.cost,
            num_text=prompts.num_text,
        )
        generator = torch.Generator().manual_seed(self.seed)
        draws = [torch.rand(n, generator=generator) for n in prompts.num_visual]
        state.notes["draws"] = torch.nn.utils.rnn.pad_sequence(draws, batch_first=True)
        state.schedule = plan.tolist()

    def needs(self, cut: int, state: PromptState) -> Needs | None:
        assert state.schedule is not None
        before = [plan[cut - 1] for plan in state.schedule] if cut else state.prompts.num_visual
        due = any(plan[cut] < count for plan, count in zip(state.schedule, before, strict=True))
        return Needs() if due else None

    def select(self, seen: Observation, state: PromptState) -> Selection:
        assert state.schedule is not None
        counts = [plan[seen.cut] for plan in state.schedule]
        draws = state.notes["draws"].to(seen.index.device)
        scores = draws.gather(1, seen.index.clamp(min=0))
        return Selection(top_k(scores, counts, seen.mask), counts)
