"""Average pooling: the floor that merges what is near."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from ..contract import Needs, Observation, PromptState, Selection, Tower
from ..parts.grid import grid_cells
from ..parts.mergers import absorb
from ..parts.selectors import top_k
from .base import PreDecoder


@dataclass(frozen=True)
class Pooling(PreDecoder):
    """Merges neighbouring visual tokens into their mean, before the decoder.

    The cells are those of `uniform`; the token in the middle of each becomes the mean of its cell: of a
    grid of 24 x 24 and a budget of 144 this is 2 x 2 average pooling. Image newlines are dropped first.
    Where it is not known how the tokens lie, runs of tokens are merged.

    Args:
        budget: a `Budget`, or the mean number of visual tokens entering a layer.
    """

    name: ClassVar[str] = "pooling"
    paper: ClassVar[str] = "none: a floor that knows nothing but distance"
    looks: ClassVar[Needs] = Needs(vision=True, hidden=True)
    sees: ClassVar[Tower] = Tower(places=True)
    merges: ClassVar[bool] = True

    def choose(self, seen: Observation, counts: Sequence[int], state: PromptState) -> Selection:
        assert seen.hidden is not None
        cell, middle = grid_cells(seen.places, counts, seen.mask)
        kept = top_k(middle.float(), counts, seen.mask)
        # No token is the middle of a cell that lies behind the last one.
        width = cell.shape[1]
        position = torch.arange(width, device=cell.device).expand_as(cell)
        middles = cell.new_full((len(counts), width + 1), -1)
        middles.scatter_(1, cell.masked_fill(~middle, width), position)
        owner = middles.gather(1, cell.clamp(min=0)).masked_fill(cell < 0, -1)
        return Selection(kept, list(counts), states=absorb(seen.hidden(), kept, owner))
