"""SparseVLM: three cuts by the attention of the words that the picture speaks to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch

from ..contract import Needs, Observation, PromptState, Selection
from ..parts.mergers import discard, dpc_knn
from ..parts.scorers import text_attention
from ..policy.schedules import at_depth, schedule_from_cuts
from .base import Planned, check_choice, refuse_summary

CUTS = (3, 7, 16)
OFFICIAL_TOKENS = 576
OFFICIAL_LEVELS = {
    1: ((66, 30, 17), (238, 48, 26), (303, 110, 36), (303, 200, 110)),
    2: ((66, 34, 20), (246, 54, 28), (246, 108, 60), (300, 200, 118)),
}
"""Official lists of each version for 64, 96, 128 and 192 tokens. So that no level falls, the 300 of the
first version's last list is raised to 303, and the 238 of the second version's third one to 246."""

PRIORITY_HEADS = 14 / 32
"""Heads of which the second version takes the attention: 14 of the 32 of LLaVA-1.5."""

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
    The second version of the official code (SparseVLM+) has other lists, takes the attention of those 14
    of 32 heads only that pay most to the picture, merges nothing, and keeps positions.
    Differs from the official code: tokens keep their positions, where the first version numbers those that
    are left anew (`positions`); levels are interpolated linearly between the official lists, as
    shares of 576, to fit the budget; merged tokens are inside these levels, stand at their cluster's
    centre instead of behind the picture, and ties between centres are not broken at random; attention is
    not divided by what the rotation alone would give, as in the second version.

    Args:
        budget: a `Budget`, or the mean number of visual tokens entering a layer.
        version: 1 or 2.
        recycle: False loses all dropped tokens, as the second version always does.
        proportional: a merged token counts in the decoder's attention for as many as it is made of: its score
            gets the logarithm of their number (proportional attention, ToMe's equation 1).
    """

    name: ClassVar[str] = "sparsevlm"
    paper: ClassVar[str] = (
        "SparseVLM: Visual Token Sparsification for Efficient Vision-Language Model Inference, "
        "ICML 2025, arxiv.org/abs/2410.04417"
    )
    released: ClassVar[Mapping[str, Any]] = {"positions": "compacted"}

    version: int = 1
    recycle: bool = True
    proportional: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice(self, "version", tuple(OFFICIAL_LEVELS))
        if self.recycles and self.summary is not None:
            refuse_summary(self)

    @property
    def recycles(self) -> bool:
        return self.recycle and self.version == 1

    def shape(self, setting: int, num_visual: int, num_layers: int) -> list[int]:
        lists = self._lists()
        piece = min(setting // STEPS, len(lists) - 2)
        part = setting / STEPS - piece
        shares = [
            (low + part * (high - low)) / OFFICIAL_TOKENS
            for low, high in zip(lists[piece], lists[piece + 1], strict=True)
        ]
        levels = [max(1, round(num_visual * share)) for share in shares]
        cuts = [at_depth(cut, num_layers) for cut in CUTS]
        return schedule_from_cuts(num_visual, num_layers, cuts, levels)

    def settings(self, num_visual: int, num_layers: int) -> range:
        return range(STEPS * (len(self._lists()) - 1) + 1)

    def _lists(self) -> list[tuple[int, int, int]]:
        """The official lists, between those for no token and for all."""
        return [(0, 0, 0), *OFFICIAL_LEVELS[self.version], (OFFICIAL_TOKENS,) * 3]

    def needs(self, cut: int, state: PromptState) -> Needs | None:
        assert state.schedule is not None
        if cut == 0:
            cuts_later = any(plan[-1] < plan[0] for plan in state.schedule)
            return Needs(hidden=True) if cuts_later else None
        due = any(plan[cut] < plan[cut - 1] for plan in state.schedule)
        return Needs(rows="text", hidden=self.recycles) if due else None

    def select(self, seen: Observation, state: PromptState) -> Selection | None:
        if seen.cut == 0:
            state.notes["raters"] = raters(seen)
            return None
        return super().select(seen, state)

    def choose(self, seen: Observation, counts: Sequence[int], state: PromptState) -> Selection:
        rating = state.notes["raters"]
        if self.version == 2:
            seen = replace(seen, attention=priority_heads(seen, rating))
        scores = text_attention(seen, rating)
        if self.recycles:
            return dpc_knn(seen, scores, counts, self.proportional)
        return discard(seen, scores, counts)


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


def priority_heads(seen: Observation, raters: torch.Tensor) -> torch.Tensor:
    """The attention of the heads that pay most to the picture, [batch, those heads, text, V].

    Args:
        raters: bool [batch, text], whose attention counts.
    """
    attention = seen.attention
    assert attention is not None
    counts = raters[:, None, :, None] & seen.mask[:, None, None]
    paid = attention.masked_fill(~counts, 0.0).sum(dim=(2, 3))
    number = max(1, round(PRIORITY_HEADS * paid.shape[1]))
    best = paid.sort(dim=1, descending=True, stable=True).indices[:, :number]
    return attention.gather(1, best[..., None, None].expand(-1, -1, *attention.shape[2:]))
