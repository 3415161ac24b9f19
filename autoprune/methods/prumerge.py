"""LLaVA-PruMerge+: outliers of the vision tower's attention and a grid, before the decoder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from ..contract import Needs, Observation, PromptState, Selection, Tower
from ..parts.gather import tokens_at
from ..parts.scorers import cosine, real_patches, required_vision, required_vision_attention
from ..parts.selectors import evenly_spaced, ranks, top_by_tier
from ..parts.transfer import to_device
from .base import Ordered


@dataclass(frozen=True)
class PruMerge(Ordered):
    """Keeps outliers of the vision tower's attention and evenly spaced tokens, before the decoder.

    Tokens whose CLS attention a exceeds Q3 + 1.5 (Q3 - Q1), its quartiles over the prompt, are kept,
    the most attended first, and evenly spaced others up to the budget (PruMerge+). Every kept token x_i takes
    in the dropped ones among its nearest by key: (x_i + sum_j a_j x_j) / (1 + sum_j a_j).
    Differs from the official code: tokens keep their positions and their order, where the code hands
    over first the outliers, by falling attention, and then the others and numbers them anew, and
    patches of padding come last, where it takes them as any other (`positions`, `order`,
    `mask_padding`); the number kept is the budget's instead of about four times that of outliers, so
    the spacing follows from it; only dropped tokens are taken in, as in the paper, where the code also
    mixes kept ones; the sum is divided by its weights; tokens are merged behind the projector;
    attention and keys are those of the block whose output the decoder receives, per head and then
    averaged, instead of the last block's; no extra token collects everything dropped; all pictures of a
    prompt share one budget; where the tower has no CLS token, the attention that a patch receives
    stands in.

    Args:
        budget: a `Budget`, or the mean number of visual tokens entering a layer.
        neighbours: how many dropped tokens a kept one takes in.
    """

    name: ClassVar[str] = "prumerge"
    paper: ClassVar[str] = (
        "LLaVA-PruMerge: Adaptive Token Reduction for Efficient Large Multimodal Models, ICCV 2025, "
        "arxiv.org/abs/2403.15388"
    )
    released: ClassVar[Mapping[str, Any]] = {
        "positions": "compacted",
        "mask_padding": False,
        "order": "released",
    }
    looks: ClassVar[Needs] = Needs(vision=True, hidden=True)
    sees: ClassVar[Tower] = Tower(attention=True, keys=True)
    merges: ClassVar[bool] = True

    neighbours: int = 32

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.neighbours < 0:
            raise ValueError(f"neighbours must be 0 or more, got {self.neighbours!r}")

    def choose(self, seen: Observation, counts: Sequence[int], state: PromptState) -> Selection:
        attention, keys = required_vision_attention(seen), required_vision(seen, "vision_keys")
        assert seen.hidden is not None
        real = real_patches(seen, keys)
        allowed = to_device(list(counts), attention.device)
        rank = ranks(attention, real)
        outlier = outliers(attention, real) & (rank < allowed[:, None])
        spaced = evenly_spaced(real & ~outlier, allowed - outlier.sum(dim=1))
        tiers = 2 * outlier.long() + spaced.long()
        kept = top_by_tier(tiers, attention, counts, seen.mask)
        dropped = real & ~(outlier | spaced)
        keys = keys.nan_to_num()
        similarity = cosine(tokens_at(keys, kept.clamp(min=0)), keys)
        weights = self._weights(similarity, attention, dropped)
        selection = Selection(kept, list(counts), states=taken_in(seen.hidden(), kept, weights))
        behind = rank.shape[1] + 1 - spaced.long()
        return self.ordered(selection, torch.where(outlier, rank, behind))

    def _weights(
        self, similarity: torch.Tensor, attention: torch.Tensor, dropped: torch.Tensor
    ) -> torch.Tensor:
        """How much of each token a kept one takes in, [batch, K, V]: its attention, or 0."""
        similarity = similarity.masked_fill(~dropped[:, None], float("-inf"))
        nearest = similarity.topk(min(self.neighbours, similarity.shape[2]), dim=2)
        near = torch.zeros_like(similarity).scatter(2, nearest.indices, 1.0)
        return near * dropped[:, None] * attention[:, None]


def outliers(attention: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    """Tokens above the third quartile by more than 1.5 interquartile ranges, bool [batch, V]."""
    values = attention.masked_fill(~real, float("nan"))
    low, high = values.nanquantile(
        torch.tensor([0.25, 0.75], device=values.device), dim=1, keepdim=True
    )
    return real & (attention > high + 1.5 * (high - low))


def taken_in(hidden: torch.Tensor, kept: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Kept tokens with weight 1 and others by `weights` [batch, K, V]: weighted means [batch, K, size]."""
    kept, weights = kept.to(hidden.device), weights.to(hidden.device)
    own = tokens_at(hidden, kept.clamp(min=0)).float()
    total = 1.0 + weights.sum(dim=2, keepdim=True)
    return ((own + weights @ hidden.float()) / total).to(hidden.dtype)
