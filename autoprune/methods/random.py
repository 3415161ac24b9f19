"""Random pruning: the floor that every method has to beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from ..contract import Observation, PromptState
from ..parts.transfer import to_device
from .base import PreDecoder


@dataclass(frozen=True)
class Random(PreDecoder):
    """Keeps visual tokens at random, cut before the decoder.

    The k-th prompt of a batch always gets the k-th draw of the seed, so that prompts of one size that come one
    by one all keep the same places: compare in batches, or with several seeds.

    Args:
        budget: a `Budget`, or the mean number of visual tokens entering a layer.
        seed: which tokens.
    """

    name: ClassVar[str] = "random"
    paper: ClassVar[str] = "none: the floor that every method has to beat"

    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed must be a whole number from 0 to 2^63 - 1, got {self.seed!r}")

    def score(self, seen: Observation, state: PromptState) -> torch.Tensor:
        generator = torch.Generator().manual_seed(self.seed)
        draws = [torch.rand(n, generator=generator) for n in seen.counts]
        drawn = torch.nn.utils.rnn.pad_sequence(draws, batch_first=True)
        return to_device(drawn, seen.mask.device)
