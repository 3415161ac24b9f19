"""A method for tests that cuts nothing and shows what the engine saw."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import nn

from autoprune.contract import Needs, Observation, PromptState, Selection, Tower
from autoprune.methods.base import Method
from autoprune.policy.budget import Budget

SCORES = Tower(attention=True)
# A quarter of the depth is the first block of every tower of the zoo.
EVERYTHING = Tower(attention=True, keys=True, middle=0.25, places=True)


@dataclass(frozen=True)
class Watch(Method):
    """Asks for what the vision tower tells before layer 0 and keeps every token."""

    name: ClassVar[str] = "watch"
    paper: ClassVar[str] = "none"

    budget: Budget = field(default_factory=lambda: Budget.ratio(1.0))
    seen: list[Observation] = field(default_factory=list)
    wanted: Tower = SCORES

    def tower(self) -> Tower:
        return self.wanted

    def needs(self, cut: int, state: PromptState) -> Needs | None:
        return Needs(vision=True) if cut == 0 else None

    def select(self, seen: Observation, state: PromptState) -> Selection | None:
        self.seen.append(seen)
        return None


def observe(
    model: nn.Module, arguments: dict[str, Any], wanted: Tower = SCORES, **generation: Any
) -> Observation:
    """What is seen before layer 0 in a plain forward, or while generating if options are given."""
    method = Watch(wanted=wanted)
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


def tower_values(
    model: nn.Module, arguments: dict[str, Any], **generation: Any
) -> list[torch.Tensor]:
    """All the tower tells of each prompt's visual tokens: [N, places, scores, middle and keys].

    The pictures of a prompt are numbered in the order in which its tokens mention them.
    """
    seen = observe(model, arguments, EVERYTHING, **generation)
    assert seen.places is not None and seen.vision_scores is not None
    assert seen.vision_middle is not None and seen.vision_keys is not None
    scores = torch.stack([seen.vision_scores, seen.vision_middle], dim=-1)
    values = torch.cat([seen.places, scores, seen.vision_keys], dim=-1)
    return [renumbered(prompt[real]) for prompt, real in zip(values, seen.mask, strict=True)]


def renumbered(values: torch.Tensor) -> torch.Tensor:
    """The same with the pictures, its first column, numbered as they come."""
    numbers: dict[float, float] = {}
    pictures = [
        number if number != number else numbers.setdefault(number, float(len(numbers)))
        for number in values[:, 0].tolist()
    ]
    return torch.cat([torch.tensor(pictures)[:, None], values[:, 1:]], dim=1)
