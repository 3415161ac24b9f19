"""ToMe: similar visual tokens are merged, in the vision tower and before the decoder."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from ..contract import Needs, Observation, Patches, PromptState, Selection, Tower
from ..parts.mergers import absorb, join_similar, merge_similar, owned
from ..parts.scorers import real_patches, required_vision, required_vision_attention
from ..parts.selectors import ranks, top_k
from ..parts.transfer import to_device
from .base import TowerScored


@dataclass(frozen=True)
class ToMe(TowerScored):
    """Merges visual tokens whose keys are similar, a few in each block of the vision tower.

    In each round every other token finds its most similar counterpart among the rest, and the most
    similar pairs are merged into their mean, weighted by how many tokens each already stands for (bipartite
    soft matching). A CLS token counts and stays: behind it the second, the fourth, ... token are those that
    look for a counterpart, without it the first, the third, ...
    Each block up to the one whose output the decoder receives is a round, and what is to go is spread
    evenly over them. The next block sees the tokens that are left, and log(size) is added to its scores
    (proportional attention). The last round is the cut before the decoder.
    Differs from the official code: a token keeps its position, where a tower with fewer tokens has the
    decoder number them anew, and patches of padding are dropped first, where the code merges them as any
    other (`positions`, `mask_padding`); tokens are merged behind a block, not between its attention and its
    MLP; they keep their order, so that later rounds split them otherwise; attention is not proportional
    with flash or flex attention; in the tower all pictures of a batch are left with the largest share that
    one of its prompts keeps, so that a prompt may get other tokens in a batch than alone; in the last
    round tokens of different pictures of a prompt may be merged, after the projector; keys are means over
    heads and, there, of a merged token's parts; a merged token keeps the position of the one that the
    others joined, or of its first patch if it was made in the tower; image newlines are dropped first, but
    counted in the share, so that at large budgets a few tokens of one group may enter side by side.
    This holds for LLaVA, LLaVA-NeXT and PaliGemma, with CLIP and SigLIP towers. Elsewhere, if features of
    several blocks are joined or vision scores are given, and for features computed ahead of the prompt
    (`encode`), the tower is not sped up: all rounds follow each other at its end, on the keys of the
    block whose output the decoder receives, which are means over the patches of a token.

    Args:
        budget: a `Budget`, or the mean number of visual tokens entering a layer.
        rounds: for merging at the tower's end only, over how many rounds the merges are spread evenly, one
            for each block of ViT-L; more follow where a round cannot take its share.
        proportional: a merged token counts in the decoder's attention for as many as it is made of: its score
            gets the logarithm of their number (proportional attention, ToMe's equation 1).
    """

    name: ClassVar[str] = "tome"
    paper: ClassVar[str] = "Token Merging: Your ViT But Faster, ICLR 2023, arxiv.org/abs/2210.09461"
    released: ClassVar[Mapping[str, Any]] = {"positions": "compacted", "mask_padding": False}
    looks: ClassVar[Needs] = Needs(vision=True, hidden=True)
    sees: ClassVar[Tower] = Tower(attention=True, keys=True, merge=True)
    merges: ClassVar[bool] = True

    rounds: int = 24
    proportional: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rounds < 1:
            raise ValueError(f"rounds must be 1 or more, got {self.rounds!r}")

    def choose(self, seen: Observation, counts: Sequence[int], state: PromptState) -> Selection:
        keys = required_vision(seen, "vision_keys")
        assert seen.hidden is not None
        real, groups = real_patches(seen, keys), seen.vision_groups
        owner = merge_similar(
            keys.nan_to_num(),
            real,
            seen.counts,
            counts,
            self.rounds if groups is None else 1,
            self.worth(lambda: required_vision_attention(seen), real.float()),
            groups,
            state.shape.has_cls,
        )
        position = torch.arange(owner.shape[1], device=owner.device)
        first = (owner == position).float() + real.float()
        # Where the tower left fewer groups than are kept, other tokens of a group, which are like it.
        stays = ranks(first, seen.mask) < to_device(list(counts), owner.device)[:, None]
        kept = top_k(first, counts, seen.mask)
        owner = torch.where(stays, position, owner)
        sizes = owned(kept, owner) if self.proportional else None
        states = absorb(seen.hidden(), kept, owner)
        return Selection(kept, list(counts), states=states, sizes=sizes)

    def merge(self, seen: Patches, leaving: int) -> torch.Tensor:
        number = torch.full((len(seen.sizes),), leaving, device=seen.sizes.device)
        worth = self.worth(seen.attention, seen.sizes)
        return join_similar(seen.keys, number, worth, has_cls=seen.has_cls)

    def worth(
        self, attention: Callable[[], torch.Tensor], patches: torch.Tensor
    ) -> torch.Tensor | None:
        """What is taken off the similarity with which a token joins another, [batch, V]; None: nothing.

        Args:
            attention: gives the attention of each token [batch, V], that of one of its patches.
            patches: [batch, V], how many patches each token is; 0 for those that take no part.
        """
        return None
