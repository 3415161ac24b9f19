"""HiPrune: one cut before the decoder, by the attention in two blocks of the vision tower."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from ..contract import Needs, Observation, PromptState, Selection, Tower
from ..parts.gather import tokens_at
from ..parts.scorers import real_patches, required_vision
from ..parts.selectors import ranks, top_by_tier, top_k
from ..parts.transfer import to_device
from .base import TowerScored


@dataclass(frozen=True)
class HiPrune(TowerScored):
    """Keeps what two blocks of the vision tower attend to, and what lies beside it, before the decoder.

    A share alpha / 5 of the budget goes to anchors, the tokens that receive most attention in a middle
    block of the tower, as many as four times that to the anchors' direct neighbours (buffers), and the
    rest to the tokens that receive most in the block whose output the decoder receives (registers).
    Attention is the mean over heads and over all queries, a CLS token's among them. As in the official
    code the number of anchors is rounded: up to 2.5 / alpha tokens (25) there are registers only.
    Differs from the official code: tokens keep their positions, where the code numbers those that are left
    anew, and patches of padding come last, where it takes them as any other (`positions`,
    `mask_padding`); neighbours end at the picture's border instead of running on in the
    row before or behind; all pictures of a prompt share one budget; image newlines are dropped first.

    Args:
        budget: a `Budget`, or the mean number of visual tokens entering a layer.
        alpha: share of the budget that goes to anchors and buffers, in [0, 1].
        middle: the block that ranks the anchors, as a share of the tower's depth, in (0, 1]; the
            paper's is 9 of 24, and 16 of 32 for Qwen2.5-VL.
    """

    name: ClassVar[str] = "hiprune"
    paper: ClassVar[str] = (
        "HiPrune: Training-Free Visual Token Pruning via Hierarchical Attention in Vision-Language "
        "Models, 2025, arxiv.org/abs/2508.00553"
    )
    released: ClassVar[Mapping[str, Any]] = {"positions": "compacted", "mask_padding": False}
    looks: ClassVar[Needs] = Needs(vision=True)

    alpha: float = 0.1
    middle: float = 9 / 24

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha must be between 0 and 1, got {self.alpha!r}")
        if not 0 < self.middle <= 1:
            raise ValueError(f"middle must be above 0 and at most 1, got {self.middle!r}")

    def tower(self) -> Tower:
        return Tower(received=True, middle=self.middle, places=True)

    def choose(self, seen: Observation, counts: Sequence[int], state: PromptState) -> Selection:
        scores, middle = (required_vision(seen, f"vision_{n}") for n in ("received", "middle"))
        real = real_patches(seen, middle)
        scores = scores.where(real, 0.0)
        number = [round(count * self.alpha / 5) for count in counts]
        anchors = top_k(middle.masked_fill(~real, -1.0), number, seen.mask)
        near = real & neighbours(required_vision(seen, "places"), anchors)
        most = to_device(number, middle.device)[:, None]
        anchor = real & (ranks(middle, real) < most)
        tiers = 2 * anchor.long() + near.long()
        return Selection(top_by_tier(tiers, scores, counts, seen.mask), list(counts))


def neighbours(places: torch.Tensor, anchors: torch.Tensor) -> torch.Tensor:
    """Which tokens touch an anchor's side, bool [batch, V].

    Args:
        places: as `Observation.places`, [batch, V, 3].
        anchors: LongTensor [batch, A], positions; -1 is padding.
    """
    apart = (tokens_at(places, anchors.clamp(min=0))[:, :, None] - places[:, None]).abs()
    touches = (apart[..., 0] == 0) & (apart[..., 1:].sum(dim=-1) == 1)
    return (touches & (anchors >= 0)[..., None]).any(dim=1)
