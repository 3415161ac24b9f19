"""A pruning method of one's own: random tokens, the floor that every other method must beat."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from autoprune import Budget, tiny
from autoprune.contract import Needs, Observation, PromptState, Selection
from autoprune.methods.base import Method
from autoprune.parts.selectors import top_k
from autoprune.policy.solver import solve_schedule


@dataclass(frozen=True)
class RandomPruning(Method):
    """As many tokens in every layer as the budget pays for, chosen by chance."""

    name: ClassVar[str] = "random"
    paper: ClassVar[str] = "a baseline"

    budget: Budget | float = 64
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "budget", Budget.of(self.budget))

    def begin(self, state: PromptState) -> None:
        """Plan before the first layer: nothing that is seen later changes this schedule."""
        visual = np.asarray(state.prompts.num_visual)
        state.schedule = solve_schedule(
            np.ones(state.shape.num_layers),
            visual,
            self.budget,
            cost=state.shape.cost,
            num_text=state.prompts.num_text,
            fixed=visual[:, None],
        ).tolist()

    def needs(self, cut: int, state: PromptState) -> Needs | None:
        """A cut where some prompt's schedule falls; nothing must be seen for it."""
        falls = cut > 0 and any(counts[cut] < counts[cut - 1] for counts in state.schedule)
        return Needs() if falls else None

    def select(self, seen: Observation, state: PromptState) -> Selection:
        """Keep the best of random scores."""
        generator = torch.Generator().manual_seed(self.seed + seen.cut)
        scores = torch.rand(seen.mask.shape, generator=generator).to(seen.mask.device)
        counts = [schedule[seen.cut] for schedule in state.schedule]
        return Selection(top_k(scores, counts, seen.mask), counts)


if __name__ == "__main__":
    model, processor = tiny.load()
    scene = tiny.draw_scene(seed=1518)
    with RandomPruning(budget=16)(model) as trace:
        print(tiny.answer(model, processor, scene.image, "how many crosses are there?"))
    print(trace.samples[0].tokens_per_layer, sum(trace.samples[0].tokens_per_layer))
