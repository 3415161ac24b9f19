"""CDPruner: one cut before the decoder, for tokens that are relevant to the text and diverse."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from ..contract import Needs, Observation, PromptState, Selection
from ..parts.scorers import text_relevance
from ..parts.selectors import dpp_map
from .base import PreDecoder


@dataclass(frozen=True)
class CDPruner(PreDecoder):
    """Keeps visual tokens that are both relevant to the text and diverse, cut before the decoder.

    The kept set is to maximise the determinant of L_ij = r_i cos(f_i, f_j) r_j over its tokens (a
    conditional determinantal point process, greedy MAP), with the embeddings f that the decoder receives
    and the relevance r: the mean cosine of f_i and the text tokens behind the picture, scaled to [0, 1].
    Needs nothing of the vision tower and works with any model.
    Differs from the official code: tokens keep their positions, where the code numbers those that are left
    anew (`positions`); relevance is measured in the decoder's embedding space, which every
    model has, instead of by CLIP's text encoder, and the cosine has its own sign, where the code takes
    CLIP's negative; all pictures of a prompt share one budget, and image newlines take part.

    Args:
        budget: a `Budget`, or the mean number of visual tokens entering a layer.
        negative: take the cosine negative, as the official code does with CLIP's.
    """

    name: ClassVar[str] = "cdpruner"
    paper: ClassVar[str] = (
        "Beyond Attention or Similarity: Maximizing Conditional Diversity for Token Pruning in MLLMs, "
        "NeurIPS 2025, arxiv.org/abs/2506.10967"
    )
    released: ClassVar[Mapping[str, Any]] = {"positions": "compacted"}
    looks: ClassVar[Needs] = Needs(hidden=True)

    negative: bool = False

    def choose(self, seen: Observation, counts: Sequence[int], state: PromptState) -> Selection:
        assert seen.hidden is not None and seen.text_hidden is not None
        assert seen.text_mask is not None
        hidden, text = seen.hidden(), seen.text_hidden()
        if self.negative:
            text = -text
        relevance = text_relevance(hidden, text, seen.text_mask, seen.mask)
        return Selection(dpp_map(hidden, relevance, counts, seen.mask), list(counts))
