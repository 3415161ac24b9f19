"""What the unpruned model looks at: the attention of the text on the visual tokens, in every layer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from ..contract import ModelShape, Needs, Observation, PromptState, Tower
from ..policy.budget import Budget
from .base import Method


@dataclass(frozen=True)
class Looked:
    """What was seen of one prompt, on the CPU.

    attention: float32 [layers, N]: how much the text behind the last visual token attends to each visual
        token, mean over heads and over these text tokens. The softmax is over all keys, so that a layer's row
        sums to the share of attention that the picture gets, at most 1.
    places: float32 [N, 3], which picture (or frame, or tile) a visual token belongs to, and its row and column
        there; NaN for tokens without a patch, such as the ends of rows. None where the model's grid is
        not known.
    """

    attention: torch.Tensor
    places: torch.Tensor | None


@dataclass(frozen=True)
class Looking(Method):
    """Prunes nothing and hands on what is seen at every cut.

    Args:
        show: called with what is seen of each layer: its index and the observation.
    """

    name: ClassVar[str] = "looking"
    paper: ClassVar[str] = "none: the whole picture"

    show: Callable[[int, Observation], None]
    budget: Budget = field(default_factory=lambda: Budget.ratio(1))

    def tower(self) -> Tower:
        return Tower(places=True)

    def check(self, shape: ModelShape) -> None:
        if shape.num_layers < 2:
            raise ValueError("a model of one layer has no cut at which its attention can be seen")

    def needs(self, cut: int, state: PromptState) -> Needs | None:
        """The layer before each cut, and the last layer ahead of its turn, as no cut is behind it."""
        if cut == 0:
            return None
        last = Needs(rows="all", ahead=True) if cut == state.shape.num_layers - 1 else None
        return Needs(rows="all", vision=True, beside=last)

    def select(self, seen: Observation, state: PromptState) -> None:
        self.show(seen.cut - 1, seen)
        if seen.beside is not None:
            self.show(seen.cut, seen.beside)


@torch.inference_mode()
def look(model: torch.nn.Module, inputs: Any) -> Looked:
    """Run the unpruned model on one prompt and keep what its text attends to.

    Works with every attention implementation, and nothing of the size of text times text is made.

    Args:
        inputs: of `model.generate`, one prompt.

    Raises:
        UnsupportedError: the model is no vision-language model this library can prune.
        ValueError: there is not exactly one prompt, or it has no picture.
    """
    layers: dict[int, torch.Tensor] = {}
    places: list[torch.Tensor] = []

    def show(layer: int, seen: Observation) -> None:
        if len(seen.counts) != 1:
            raise ValueError(f"look takes one prompt, got a batch of {len(seen.counts)}")
        assert seen.attention is not None
        layers[layer] = seen.attention[0].float().mean(dim=(0, 1)).cpu()
        if seen.places is not None and not places:
            places.append(seen.places[0].cpu())

    with Looking(show)(model):
        model.generate(**inputs, max_new_tokens=1, do_sample=False, num_beams=1)  # type: ignore[operator]
    if not layers:
        raise ValueError("the prompt has no picture, so there is no attention to look at")
    attention = torch.stack([layers[layer] for layer in sorted(layers)])
    return Looked(attention, places[0] if places else None)
