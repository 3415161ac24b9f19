"""VisPruner: one cut before the decoder, by the vision tower's attention and by difference."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from ..contract import Needs, Observation, PromptState, Selection, Tower
from ..parts.scorers import real_patches, required_vision_attention
from ..parts.selectors import ranks, top_by_tier, without_duplicates
from ..parts.transfer import to_device
from .base import TowerScored

AT_ONCE = 8


@dataclass(frozen=True)
class VisPruner(TowerScored):
    """Keeps what the vision tower attends to, and of the rest what differs, before the decoder.

    A share `ratio` of the budget goes to the tokens most attended by the CLS token. Of the others, in the
    order of attention, those that most resemble another are removed, 8 at a time, until the budget is
    met: each round compares every other token with all those between.
    Differs from the official code: tokens keep their positions, where the code numbers those that are left
    anew, and patches of padding come last, where it takes them as any other (`positions`,
    `mask_padding`); tokens are compared as the decoder receives them instead of before the projector; all
    pictures of a prompt share one budget; where the tower has no CLS token, the attention
    that a patch receives from the others stands in; image newlines are dropped first instead of kept.

    Args:
        budget: a `Budget`, or the mean number of visual tokens entering a layer.
        ratio: share of the budget that goes to the most attended tokens, in [0, 1].
    """

    name: ClassVar[str] = "vispruner"
    paper: ClassVar[str] = (
        "Beyond Text-Visual Attention: Exploiting Visual Cues for Effective Token Pruning in VLMs, "
        "ICCV 2025, arxiv.org/abs/2412.01818"
    )
    released: ClassVar[Mapping[str, Any]] = {"positions": "compacted", "mask_padding": False}
    looks: ClassVar[Needs] = Needs(vision=True, hidden=True)
    sees: ClassVar[Tower] = Tower(attention=True)

    ratio: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.ratio <= 1:
            raise ValueError(f"ratio must be between 0 and 1, got {self.ratio!r}")

    def choose(self, seen: Observation, counts: Sequence[int], state: PromptState) -> Selection:
        scores = required_vision_attention(seen)
        assert seen.hidden is not None and seen.vision_scores is not None
        real = real_patches(seen, seen.vision_scores)
        attended = [int(count * self.ratio) for count in counts]
        rank, most = ranks(scores, real), to_device(attended, scores.device)[:, None]
        important, others = real & (rank < most), real & (rank >= most)
        distinct = without_duplicates(
            seen.hidden(),
            ranks(-rank.float(), others).argsort(dim=1),
            [n - m for n, m in zip(seen.counts, attended, strict=True)],
            others.sum(dim=1),
            [n - m for n, m in zip(counts, attended, strict=True)],
            AT_ONCE,
        )
        tiers = 2 * important.long() + distinct.long()
        return Selection(top_by_tier(tiers, scores, counts, seen.mask), list(counts))
