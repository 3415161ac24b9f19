"""Random pruning: the floor that every method has to beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from ..method import Observation, PromptState
from ..planned import PreDecoder


@dataclass(frozen=True)
class Random(PreDecoder):
    """Keeps visual tokens at random, cut before the decoder.

    The k-th prompt of a batch always gets the k-th draw of the seed.

    Args:
        budget: a `Budget`, or the mean number of visual tokens entering a layer.
        seed: which tokens.
    """

    name: ClassVar[str] = "random"
    paper: ClassVar[str] = "none: the floor that every method has to beat"

    seed: int = 0

    def score(self, seen: Observation, state: PromptState) -> torch.Tensor:
        generator = torch.Generator().manual_seed(self.seed)
        draws = [torch.rand(n, generator=generator) for n in seen.counts]
        return torch.nn.utils.rnn.pad_sequence(draws, batch_first=True).to(seen.mask.device)
