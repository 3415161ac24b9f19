"""A method for tests that cuts nothing and shows what the engine saw."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import nn

from autoprune.budget import Budget
from autoprune.method import Method, Needs, Observation, PromptState, Selection


@dataclass(frozen=True)
class Watch(Method):
    """Asks for the vision tower's scores before layer 0 and keeps every token."""

    name: ClassVar[str] = "watch"
    paper: ClassVar[str] = "none"

    budget: Budget = field(default_factory=lambda: Budget.ratio(1.0))
    seen: list[Observation] = field(default_factory=list)

    def needs(self, cut: int, state: PromptState) -> Needs | None:
        return Needs(vision=True) if cut == 0 else None

    def select(self, seen: Observation, state: PromptState) -> Selection | None:
        self.seen.append(seen)
        return None


def observe(model: nn.Module, arguments: dict[str, Any], **generation: Any) -> Observation:
    """What is seen before layer 0 in a plain forward, or while generating if options are given."""
    method = Watch()
    with method(model), torch.no_grad():
        if generation:
            model.generate(**arguments, max_new_tokens=1, **generation)
        else:
            model(**arguments)
    return method.seen[0]


def vision_scores(
    model: nn.Module, arguments: dict[str, Any], **generation: Any
) -> list[torch.Tensor]:
    """The vision tower's scores of each prompt's visual tokens, in the order of the prompt."""
    seen = observe(model, arguments, **generation)
    assert seen.vision_scores is not None
    return [scores[real] for scores, real in zip(seen.vision_scores, seen.mask, strict=True)]
