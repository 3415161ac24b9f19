"""VTW: all visual tokens leave at one layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from ..contract import Observation, PromptState
from ..policy.schedules import schedule_from_cuts
from .base import Planned


@dataclass(frozen=True)
class VTW(Planned):
    """Withdraws all visual tokens at one layer: everything before it, nothing from it on.

    Of a prompt that ends with its picture the last token stays, inside the budget.
    Differs from the official code: the layer K is the deepest that the budget pays for, instead of the
    one found by comparing outputs on calibration samples. A layer costs N / L tokens of the mean, so that
    the budget is often far from spent; below one layer's price nothing is seen at all.

    Args:
        budget: a `Budget`, or the mean number of visual tokens entering a layer.
    """

    name: ClassVar[str] = "vtw"
    paper: ClassVar[str] = (
        "Boosting Multimodal Large Language Models with Visual Tokens Withdrawal for Rapid Inference, "
        "AAAI 2025, arxiv.org/abs/2405.05803"
    )

    def shape(self, setting: int, num_visual: int, num_layers: int) -> list[int]:
        return schedule_from_cuts(num_visual, num_layers, [setting], [0])

    def settings(self, num_visual: int, num_layers: int) -> range:
        return range(num_layers + 1)

    def score(self, seen: Observation, state: PromptState) -> torch.Tensor:
        return torch.zeros(seen.mask.shape, device=seen.mask.device)
