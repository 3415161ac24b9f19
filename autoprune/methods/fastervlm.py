"""FasterVLM: one cut before the decoder, by the vision tower's attention."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from ..contract import Needs, Observation, PromptState, Tower
from ..parts.scorers import required_vision_attention
from .base import TowerScored


@dataclass(frozen=True)
class FasterVLM(TowerScored):
    """Keeps what the vision tower's CLS token attends to, cut before the decoder.

    Differs from the official code: tokens keep their positions, where the code numbers those that are left
    anew, and patches of padding come last, where it takes them as any other (`positions`,
    `mask_padding`); all pictures and tiles of a prompt share one budget, and image newlines are dropped
    first, where the code takes equally many of each and keeps the newlines; where the tower has no CLS
    token, the attention that a patch receives from the others stands in.

    Args:
        budget: a `Budget`, or the mean number of visual tokens entering a layer.
    """

    name: ClassVar[str] = "fastervlm"
    paper: ClassVar[str] = (
        "[CLS] Attention is All You Need for Training-Free Visual Token Pruning, 2024, "
        "arxiv.org/abs/2412.01818v1 (its later version is VisPruner)"
    )
    released: ClassVar[Mapping[str, Any]] = {"positions": "compacted", "mask_padding": False}
    looks: ClassVar[Needs] = Needs(vision=True)
    sees: ClassVar[Tower] = Tower(attention=True)

    def score(self, seen: Observation, state: PromptState) -> torch.Tensor:
        return required_vision_attention(seen)
