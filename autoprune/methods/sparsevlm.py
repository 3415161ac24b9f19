"""SparseVLM: three cuts by the attention of the words that the picture speaks to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from ..mergers import get_merger
from ..method import Needs, Observation, PromptState, Selection
from ..planned import Planned
from ..schedules import at_depth, staircase
from ..scorers import text_attention

CUTS = (3, 7, 16)
OFFICIAL_TOKENS = 576
OFFICIAL_LEVELS = ((0, 0, 0), (66, 30, 17), (303, 110, 36), (303, 200, 110), (576, 576, 576))
"""Official lists for 64, 128 and 192 tokens between none and all; the last one's 300 is raised to 303
so that no level falls."""

STEPS = 2_500
"""Settings between two of these lists."""


@dataclass(frozen=True)
class SparseVLM(Planned):
    """Keeps what the words that match the picture attend to, and recycles some of the rest.

    Raters are the text tokens t behind the picture whose mean over visual tokens v of
    softmax_t(v . t), taken of the embeddings, exceeds the mean over the text tokens; where none does,
    all rate. After layers 2, 6 and 15 visual tokens are ranked by the attention of the raters in that
    layer, mean over heads and raters; the best 30 % of the dropped are merged into a tenth as many
    cluster means (DPC-KNN).
    Differs from the official code: levels are interpolated linearly between the official lists, as
    shares of 576, to fit the budget; merged tokens are inside these levels, stand at their cluster's
    centre instead of behind the picture, and ties between centres are not broken at random; positions are
    kept instead of numbered anew.

    Args:
        budget: a `Budget`, or the mean number of visual tokens entering a layer.
        recycle: False loses all dropped tokens.
    """

    name: ClassVar[str] = "sparsevlm"
    paper: ClassVar[str] = (
        "SparseVLM: Visual Token Sparsification for Efficient Vision-Language Model Inference, "
        "ICML 2025, arxiv.org/abs/2410.04417"
    )

    recycle: bool = True

    def shape(self, setting: int, num_visual: int, num_layers: int) -> list[int]:
        piece = min(setting // STEPS, len(OFFICIAL_LEVELS) - 2)
        part = setting / STEPS - piece
        shares = [
            (low + part * (high - low)) / OFFICIAL_TOKENS
            for low, high in zip(OFFICIAL_LEVELS[piece], OFFICIAL_LEVELS[piece + 1], strict=True)
        ]
        levels = [max(1, round(num_visual * share)) for share in shares]
        cuts = [at_depth(cut, num_layers) for cut in CUTS]
        return staircase(num_visual, num_layers, cuts, levels)

    def settings(self, num_visual: int, num_layers: int) -> range:
        return range(STEPS * (len(OFFICIAL_LEVELS) - 1) + 1)

    def needs(self, cut: int, state: PromptState) -> Needs | None:
        assert state.schedule is not None
        if cut == 0:
            cuts_later = any(plan[-1] < plan[0] for plan in state.schedule)
            return Needs(hidden=True) if cuts_later else None
        due = any(plan[cut] < plan[cut - 1] for plan in state.schedule)
        return Needs(rows="text", hidden=self.recycle) if due else None

    def select(self, seen: Observation, state: PromptState) -> Selection | None:
        if seen.cut == 0:
            state.notes["raters"] = raters(seen)
            return None
        return super().select(seen, state)

    def choose(self, seen: Observation, counts: Sequence[int], state: PromptState) -> Selection:
        scores = text_attention(seen, rows=state.notes["raters"])
        return get_merger("dpc_knn" if self.recycle else None)(seen, scores, counts)


def raters(seen: Observation) -> torch.Tensor:
    """The text tokens that match the picture, bool [batch, text]; all of them where none does."""
    assert seen.hidden is not None and seen.text_hidden is not None and seen.text_mask is not None
    visual, text = seen.hidden().float(), seen.text_hidden().float()
    real = seen.text_mask.to(text.device)
    affinity = (visual @ text.transpose(1, 2)).masked_fill(~real[:, None], float("-inf"))
    # A prompt without text rows has no softmax.
    shares = affinity.softmax(dim=2).nan_to_num(0.0) * seen.mask.to(text.device)[:, :, None]
    relevance = shares.sum(dim=1) / seen.mask.sum(dim=1, keepdim=True).clamp(min=1).to(text.device)
    mean = relevance.sum(dim=1, keepdim=True) / real.sum(dim=1, keepdim=True).clamp(min=1)
    chosen = (relevance > mean) & real
    return torch.where(chosen.any(dim=1, keepdim=True), chosen, real).to(seen.mask.device)
