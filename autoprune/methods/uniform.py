"""Uniform pruning: the floor that looks at nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from ..contract import Needs, Observation, PromptState, Selection, Tower
from ..parts.grid import grid_cells
from ..parts.selectors import top_k
from .base import PreDecoder


@dataclass(frozen=True)
class Uniform(PreDecoder):
    """Keeps visual tokens evenly spread over the pictures, cut before the decoder.

    Every picture's grid is divided into as many cells of like size as tokens are to be left, and the
    token in the middle of each is kept: of a grid of 24 x 24 and a budget of 144 one token of every
    2 x 2. Several pictures share the budget in proportion to their tokens. Image newlines are dropped
    first. Where it is not known how the tokens lie, every so-many-th token of the prompt is kept.

    Args:
        budget: a `Budget`, or the mean number of visual tokens entering a layer.
    """

    name: ClassVar[str] = "uniform"
    paper: ClassVar[str] = "none: a floor that looks at nothing"
    looks: ClassVar[Needs] = Needs(vision=True)
    sees: ClassVar[Tower] = Tower(places=True)

    def choose(self, seen: Observation, counts: Sequence[int], state: PromptState) -> Selection:
        _, middle = grid_cells(seen.places, counts, seen.mask)
        return Selection(top_k(middle.float(), counts, seen.mask), list(counts))
