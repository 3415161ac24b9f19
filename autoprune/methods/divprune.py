"""DivPrune: one cut before the decoder, for tokens as different from each other as possible."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from ..contract import Needs, Observation, PromptState, Selection
from ..parts.selectors import max_min_diversity
from .base import PreDecoder


@dataclass(frozen=True)
class DivPrune(PreDecoder):
    """Keeps visual tokens that differ most from each other, cut before the decoder.

    The kept set S is to maximise min_{i, j in S} (1 - cos(f_i, f_j)) over the embeddings f that the
    decoder receives; greedily, each pick is the token whose nearest pick is farthest away.
    Needs nothing of the vision tower and works with any model.
    Differs from the official code: tokens keep their positions, where the code numbers those that are left
    anew (`positions`); all pictures of a prompt share one budget and are told apart by
    their embeddings alone, image newlines take part as any other token, and the number kept follows from
    the budget.

    Args:
        budget: a `Budget`, or the mean number of visual tokens entering a layer.
    """

    name: ClassVar[str] = "divprune"
    paper: ClassVar[str] = (
        "DivPrune: Diversity-based Visual Token Pruning for Large Multimodal Models, CVPR 2025, "
        "arxiv.org/abs/2503.02175"
    )
    released: ClassVar[Mapping[str, Any]] = {"positions": "compacted"}
    looks: ClassVar[Needs] = Needs(hidden=True)

    def choose(self, seen: Observation, counts: Sequence[int], state: PromptState) -> Selection:
        assert seen.hidden is not None
        return Selection(max_min_diversity(seen.hidden(), counts, seen.mask), list(counts))
