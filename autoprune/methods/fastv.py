"""FastV: one cut in an early layer, by the attention of the prompt's last token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from ..contract import Needs, Observation, PromptState
from ..parts.scorers import text_attention
from .base import AfterLayer


@dataclass(frozen=True)
class FastV(AfterLayer):
    """Keeps what the prompt's last token attends to in an early layer, from the next layer on.

    One cut before layer `layer` (K), by the head-mean attention of the last token in layer K - 1.
    Differs from the official code: the number kept follows from the budget instead of a rate R, so that
    the K full layers are paid for; everything else is the same (positions are kept).

    Args:
        budget: a `Budget`, or the mean number of visual tokens entering a layer.
        layer: K, stated for 32 layers.
    """

    name: ClassVar[str] = "fastv"
    paper: ClassVar[str] = (
        "An Image is Worth 1/2 Tokens After Layer 2, ECCV 2024, arxiv.org/abs/2403.06764"
    )
    looks: ClassVar[Needs] = Needs(rows="last")

    def score(self, seen: Observation, state: PromptState) -> torch.Tensor:
        return text_attention(seen)
