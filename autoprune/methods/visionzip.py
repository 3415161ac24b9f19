"""VisionZip: dominant and contextual tokens, before the decoder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from ..contract import Needs, Observation, PromptState, Selection, Tower
from ..parts.mergers import absorb, owned
from ..parts.scorers import cosine, real_patches, required_vision, required_vision_attention
from ..parts.selectors import ranks, top_by_tier
from ..parts.transfer import to_device
from .base import Ordered


@dataclass(frozen=True)
class VisionZip(Ordered):
    """Keeps what the vision tower attends to and merges the rest into a few, before the decoder.

    The tokens most attended by the CLS token are kept (dominant). Of the others every so-many-th is a target
    (contextual) and becomes the mean of itself and of those whose keys are more similar (cosine) to its
    own than to any other target's.
    Differs from the official code: tokens keep their positions and their order, where the code hands
    over first the dominant and then the merged ones and numbers them anew, and patches of padding come
    last, where it takes them as any other (`positions`, `order`, `mask_padding`); tokens are merged
    behind the projector instead of before it, as a plain mean instead of the target plus the mean of
    the others; the CLS token itself is not passed on; the split of 54 : 10 is kept at every budget;
    keys are those of the block whose output the decoder receives, mean over heads and over the patches
    of a token; all pictures of a prompt share one budget; where the tower has no CLS token, the
    attention that a patch receives stands in.

    Args:
        budget: a `Budget`, or the mean number of visual tokens entering a layer.
        contextual: share of the budget that goes to merged tokens, in [0, 1].
        proportional: a merged token counts in the decoder's attention for as many as it is made of: its score
            gets the logarithm of their number (proportional attention, ToMe's equation 1).
    """

    name: ClassVar[str] = "visionzip"
    paper: ClassVar[str] = (
        "VisionZip: Longer is Better but Not Necessary in Vision Language Models, CVPR 2025, "
        "arxiv.org/abs/2412.04467"
    )
    released: ClassVar[Mapping[str, Any]] = {
        "positions": "compacted",
        "mask_padding": False,
        "order": "released",
    }
    looks: ClassVar[Needs] = Needs(vision=True, hidden=True)
    sees: ClassVar[Tower] = Tower(attention=True, keys=True)
    merges: ClassVar[bool] = True

    contextual: float = 10 / 64
    proportional: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.contextual <= 1:
            raise ValueError(f"contextual must be between 0 and 1, got {self.contextual!r}")

    def choose(self, seen: Observation, counts: Sequence[int], state: PromptState) -> Selection:
        scores, keys = required_vision_attention(seen), required_vision(seen, "vision_keys")
        assert seen.hidden is not None
        real = real_patches(seen, keys)
        merged = to_device([round(count * self.contextual) for count in counts], scores.device)
        dominant = (to_device(list(counts), scores.device) - merged)[:, None]
        merged = merged[:, None]
        rest = real & (ranks(scores, real) >= dominant)
        step = (rest.sum(dim=1, keepdim=True) // merged.clamp(min=1)).clamp(min=1)
        number = rest.cumsum(dim=1) - 1
        target = rest & (number % step == 0) & (number // step < merged)
        tiers = 2 * (real & ~rest).long() + target.long()
        kept = top_by_tier(tiers, scores, counts, seen.mask)
        similarity = cosine(keys.nan_to_num(), keys.nan_to_num())
        nearest = similarity.masked_fill(~target[:, None], float("-inf")).argmax(dim=2)
        merges = rest & ~target & target.any(dim=1, keepdim=True)
        owner = torch.where(merges, nearest, -1)
        sizes = owned(kept, owner) if self.proportional else None
        states = absorb(seen.hidden(), kept, owner)
        selection = Selection(kept, list(counts), states=states, sizes=sizes)
        return self.ordered(selection, 2 - tiers)
