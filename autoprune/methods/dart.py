"""DART: one cut in an early layer, that keeps what is least like a few pivots."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from ..contract import Needs, Observation, PromptState, Selection
from ..parts.gather import tokens_at
from ..parts.scorers import cosine
from ..parts.selectors import ranks, top_k
from ..parts.transfer import to_device
from .base import AfterLayer


@dataclass(frozen=True)
class DART(AfterLayer):
    """Keeps a few pivots and the visual tokens that are least similar to them, to avoid duplicates.

    One cut before layer `layer` (K). Pivots are the visual and the text tokens (behind the picture)
    whose keys in layer K - 1 have the largest L1 norm. One pivot after the other takes, of the visual
    tokens that are left, those whose hidden states have the smallest cosine to its own; all take equally
    many (the first ones one more, if it does not come out even). Visual pivots are kept, too.
    Differs from the official code: the number kept follows from the budget and includes the pivots; pivots
    take turns by falling key norm, visual ones first, instead of in the order of a hash table; hidden
    states are compared without the decoder's final norm. As there, keys are taken after their rotation,
    and an L1 norm changes with absolute positions: a forward without position ids, which counts the
    padding on the left, may find other pivots than `generate`.

    Args:
        budget: a `Budget`, or the mean number of visual tokens entering a layer.
        layer: K, stated for 32 layers.
        visual_pivots, text_pivots: how many pivots.
    """

    name: ClassVar[str] = "dart"
    paper: ClassVar[str] = (
        "Stop Looking for Important Tokens in Multimodal Language Models: Duplication Matters More, "
        "EMNLP 2025, arxiv.org/abs/2502.11494"
    )
    looks: ClassVar[Needs] = Needs(keys=True, hidden=True)

    visual_pivots: int = 4
    text_pivots: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("visual_pivots", "text_pivots"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be 0 or more, got {getattr(self, name)}")
        if not self.visual_pivots + self.text_pivots:
            raise ValueError(
                "visual_pivots and text_pivots are both 0; there must be a pivot to differ from"
            )

    def choose(self, seen: Observation, counts: Sequence[int], state: PromptState) -> Selection:
        assert seen.hidden is not None and seen.text_hidden is not None
        assert seen.keys is not None and seen.text_keys is not None and seen.text_mask is not None
        hidden, text_hidden = seen.hidden().float(), seen.text_hidden().float()
        free, text = seen.mask.to(hidden.device), seen.text_mask.to(hidden.device)
        keep = to_device(list(counts), hidden.device)

        visual, visual_real = _pivots(seen.keys(), free, self.visual_pivots)
        # A budget below the number of visual pivots keeps the first of them only.
        visual_real = visual_real & (visual_real.cumsum(dim=1) <= keep[:, None])
        words, words_real = _pivots(seen.text_keys(), text, self.text_pivots)
        pivots = torch.cat([tokens_at(hidden, visual), tokens_at(text_hidden, words)], dim=1)
        real = torch.cat([visual_real, words_real], dim=1)

        taken = torch.zeros_like(free).scatter(1, visual, visual_real)
        shares = _shares(keep - visual_real.sum(dim=1), real)
        likeness = cosine(pivots, hidden)
        for turn in range(pivots.shape[1]):
            order = ranks(-likeness[:, turn], free & ~taken)
            taken = taken | (order < shares[:, turn, None])
        kept = top_k(taken.float().to(seen.mask.device), counts, seen.mask)
        return Selection(kept, list(counts))


def _pivots(
    keys: torch.Tensor, mask: torch.Tensor, count: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens with the largest L1 norm of their keys [batch, key heads, n, head dim], by falling norm.

    Returns:
        Positions [batch, at most count], and which of them are real.
    """
    norm = keys.float().abs().sum(dim=(1, 3)).to(mask.device).masked_fill(~mask, float("-inf"))
    best = norm.argsort(dim=1, descending=True, stable=True)[:, :count]
    return best, mask.gather(1, best)


def _shares(total: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    """total [batch] divided among the real ones of each row of `real`, the rest to the first ones."""
    number = real.sum(dim=1, keepdim=True).clamp(min=1)
    rank = real.cumsum(dim=1) - 1
    extra = (rank < total[:, None] % number).to(total.dtype)
    return (total[:, None] // number + extra) * real
