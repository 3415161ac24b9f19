"""Turbo: similar visual tokens are merged unless they are informative, in the tower and before the decoder."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch

from .tome import ToMe


@dataclass(frozen=True)
class Turbo(ToMe):
    """Merges visual tokens that are similar and little attended, a few in each block of the vision tower.

    As `tome`, with the information degree E = R - alpha A in place of the similarity R of a token and its
    counterpart, where A is the token's CLS attention in that block in units of the mean one.
    Differs from the official code: as `tome` does, in where it merges, too; a merged token's attention is
    the mean of its parts'; alpha is stated for the mean attention, so that it does not depend on the
    number of patches (the code for LLaVA takes 5 x 100 x attention, which is 500 / 576 = 0.87 for 576
    patches; the code for BLIP takes 5 x 30, which is 0.26); hidden states are compared in the code for
    LLaVA, keys in that for BLIP and here; where the tower has no CLS token, the attention that a patch
    receives stands in.

    Args:
        budget: a `Budget`, or the mean number of visual tokens entering a layer.
        rounds: as for `tome`.
        alpha: weight of attention against similarity, 0 or more.
    """

    name: ClassVar[str] = "turbo"
    paper: ClassVar[str] = (
        "Turbo: Informativity-Driven Acceleration Plug-In for Vision-Language Models, ECCV 2024, "
        "arxiv.org/abs/2312.07408"
    )

    alpha: float = 0.87

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (math.isfinite(self.alpha) and self.alpha >= 0):
            raise ValueError(f"alpha must be a finite number, 0 or more, got {self.alpha!r}")

    def worth(self, attention: Callable[[], torch.Tensor], patches: torch.Tensor) -> torch.Tensor:
        share = attention()
        total = (share * patches).sum(dim=1, keepdim=True)
        mean = total / patches.sum(dim=1, keepdim=True).clamp(min=1)
        return self.alpha * share / mean.clamp(min=torch.finfo(mean.dtype).tiny)
