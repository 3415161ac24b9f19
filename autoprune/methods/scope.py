"""SCOPE: one cut before the decoder, for attended tokens that stand for many others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from ..contract import Needs, Observation, PromptState, Selection, Tower
from ..parts.scorers import required_vision_attention
from ..parts.selectors import weighted_coverage
from .base import TowerScored


@dataclass(frozen=True)
class SCOPE(TowerScored):
    """Keeps tokens that are attended to and cover the others, cut before the decoder.

    A kept set S covers token i by max(0, max_{j in S} cos(f_i, f_j)), with the embeddings f that the
    decoder receives. Greedily, each pick is the token j with the greatest a_j^alpha * g_j, where g_j is
    what j adds to the coverage of all tokens and a_j is the attention that the vision tower's CLS
    token pays to it.
    Differs from the official code: tokens keep their positions, where the code numbers those that are
    left anew, and patches of padding come last, where it takes them as any other (`positions`,
    `mask_padding`); tokens are compared as the decoder receives them instead of before the projector;
    all pictures of a prompt share one budget, and a token may cover one of another picture; image
    newlines and the padding of a picture are to be covered, too, but are kept last; where the tower has
    no CLS token, the attention that a patch receives from the others stands in.

    Args:
        budget: a `Budget`, or the mean number of visual tokens entering a layer.
        alpha: exponent of the attention, above 0.
    """

    name: ClassVar[str] = "scope"
    paper: ClassVar[str] = (
        "SCOPE: Saliency-Coverage Oriented Token Pruning for Efficient Multimodel LLMs, NeurIPS 2025, "
        "arxiv.org/abs/2510.24214"
    )
    released: ClassVar[Mapping[str, Any]] = {"positions": "compacted", "mask_padding": False}
    looks: ClassVar[Needs] = Needs(vision=True, hidden=True)
    sees: ClassVar[Tower] = Tower(attention=True)

    alpha: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.alpha < float("inf"):
            raise ValueError(f"alpha must be above 0 and finite, got {self.alpha!r}")

    def choose(self, seen: Observation, counts: Sequence[int], state: PromptState) -> Selection:
        assert seen.hidden is not None
        saliency = required_vision_attention(seen) ** self.alpha
        kept = weighted_coverage(seen.hidden(), saliency, counts, seen.mask)
        return Selection(kept, list(counts))
