"""ToMe: similar visual tokens are merged, before the decoder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from ..mergers import absorb, merge_similar
from ..method import Needs, Observation, PromptState, Selection, Tower
from ..planned import PreDecoder
from ..scorers import real_patches, required_vision
from ..selectors import top_k


@dataclass(frozen=True)
class ToMe(PreDecoder):
    """Merges visual tokens whose keys in the vision tower are similar, before the decoder.

    In each round every other token finds its most similar counterpart among the rest, and the most
    similar pairs are merged into their mean, weighted by how many tokens each already stands for (bipartite
    soft matching).
    Differs from the official code: the rounds follow each other at the tower's end, on the keys of the
    block whose output the decoder receives, instead of one in each block, so the tower itself is not
    sped up and there is no proportional attention; keys are means over heads and over the patches of a
    token, and of a merged token's parts; tokens of different pictures of a prompt may be merged; a merged
    token keeps the position of the one that the others joined; image newlines are dropped first.

    Args:
        budget: a `Budget`, or the mean number of visual tokens entering a layer.
        rounds: over how many rounds the merges are spread evenly, one for each block of ViT-L; more
            follow where a round cannot take its share.
    """

    name: ClassVar[str] = "tome"
    paper: ClassVar[str] = "Token Merging: Your ViT But Faster, ICLR 2023, arxiv.org/abs/2210.09461"
    looks: ClassVar[Needs] = Needs(vision=True, hidden=True)
    sees: ClassVar[Tower] = Tower(attention=True, keys=True)

    rounds: int = 24

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rounds < 1:
            raise ValueError(f"rounds must be 1 or more, got {self.rounds!r}")

    def choose(self, seen: Observation, counts: Sequence[int], state: PromptState) -> Selection:
        keys = required_vision(seen, "vision_keys")
        assert seen.hidden is not None
        real = real_patches(seen, keys)
        owner = merge_similar(
            keys.nan_to_num(), real, seen.counts, counts, self.rounds, self.worth(seen, real)
        )
        stands = owner == torch.arange(owner.shape[1], device=owner.device)
        kept = top_k(stands.float(), counts, seen.mask)
        return Selection(kept, list(counts), states=absorb(seen.hidden(), kept, owner))

    def worth(self, seen: Observation, real: torch.Tensor) -> torch.Tensor | None:
        """What is taken off the similarity with which a token joins another, [batch, V]; None: nothing."""
        return None
