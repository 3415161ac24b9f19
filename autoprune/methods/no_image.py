"""No image: what the language alone can guess."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from ..contract import Observation, PromptState
from .base import Planned


@dataclass(frozen=True)
class NoImage(Planned):
    """Drops every visual token before the decoder: what the question alone gives away.

    Of a prompt that ends with its picture the last token stays: one token of the budget is spent then.

    Args:
        budget: any; else nothing of it is spent.
    """

    name: ClassVar[str] = "no_image"
    paper: ClassVar[str] = "none: the floor without a picture"

    def shape(self, setting: int, num_visual: int, num_layers: int) -> list[int]:
        return [0] * num_layers

    def settings(self, num_visual: int, num_layers: int) -> range:
        return range(1)

    def score(self, seen: Observation, state: PromptState) -> torch.Tensor:
        return torch.zeros(seen.mask.shape, device=seen.mask.device)
