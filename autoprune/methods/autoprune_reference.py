"""AutoPrune as released: the behaviour of the paper's code, quirks included."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from ..contract import ModelShape, Needs, Observation, PromptState, Selection, Tower
from ..parts.mergers import recycle
from ..parts.scorers import text_attention, vision_attention
from ..parts.selectors import required_first, top_k
from ..policy.information import released_mutual_information
from ..policy.released import (
    cluster_count,
    dynamic_slope,
    first_cut_count,
    recycled_count,
    released_keep_fractions,
    released_runtime_counts,
)
from .any_budget import AnyBudget
from .base import Method, check_settings

TEXT_WEIGHT = 0.3


@dataclass(frozen=True)
class AutoPruneReference(Method):
    """The released AutoPrune (NeurIPS 2025), reproduced to the token for comparison and parity.

    Differs from `AutoPrune`: the budget counts tokens leaving a layer and is met by bisection only
    approximately; what enters layer 0 and the first cut is outside it; mutual information is not
    normalised and grows with the number of heads; x0 is an absolute layer index; positions are compacted
    in every layer; dropped tokens are recycled; patches of a square-padded picture have no CLS attention
    where they lie more than a patch outside of it. Ties between cluster centres go to the lowest index. As
    in the release every text row is looked at, however many there are, so behind a short picture a text of
    thousands of tokens makes it slower than not to prune.
    Differs from the release: the padding is found in the pixels, to half a pixel, as the size of the
    picture before padding is not known here.

    Args:
        budget: target mean of visual tokens leaving a layer (`target_token_num`), or
            `Budget.tokens(..., counted="leaving")`.
        x0: midpoint of the release's curve.
        k0: slope of the release's curve.
        gamma: how much information flattens the release's curve.
        recycle: merge the best dropped tokens; False plans and prunes without merging.
    """

    name: ClassVar[str] = "autoprune_reference"
    paper: ClassVar[str] = (
        "AutoPrune: Each Complexity Deserves a Pruning Policy, NeurIPS 2025 (released code)"
    )
    positions = "compacted"

    budget: AnyBudget = AnyBudget(64, counted="leaving")
    x0: float = 14.9
    k0: float = 0.4
    gamma: float = 0.2
    recycle: bool = True

    def __post_init__(self) -> None:
        if self.budget.counted != "leaving":
            raise ValueError(
                "the released code knows only a mean of tokens leaving a layer, got a budget of "
                f"{self.budget}; give it a number of tokens, or use AutoPrune"
            )
        check_settings(self)

    def tower(self) -> Tower:
        return Tower(attention=True, outside=True)

    def check(self, shape: ModelShape) -> None:
        if shape.num_layers < 3:
            raise ValueError(
                f"the released schedule needs at least 3 layers, the model has {shape.num_layers}"
            )

    def begin(self, state: PromptState) -> None:
        state.notes["first"] = [
            first_cut_count(self.budget.value, n) for n in state.prompts.num_visual
        ]

    def needs(self, cut: int, state: PromptState) -> Needs | None:
        return Needs(rows="all", vision=cut == 1, hidden=self.recycle) if cut else None

    def select(self, seen: Observation, state: PromptState) -> Selection | None:
        if seen.cut == 1:
            return self._first_cut(seen, state)
        if seen.cut == 2:
            self._measure(seen, state)
        counts = [
            self._kept(fractions, first, seen.cut, present)
            for fractions, first, present in zip(
                state.notes["fractions"], state.notes["first"], seen.counts, strict=True
            )
        ]
        if counts == seen.counts:
            return None
        scores = text_attention(seen)
        if not self.recycle:
            return Selection(top_k(required_first(scores, seen), counts, seen.mask), counts)
        recycled = [recycled_count(n - k) for n, k in zip(seen.counts, counts, strict=True)]
        clusters = [cluster_count(m) for m in recycled]
        return recycle(seen, scores, counts, recycled, clusters, behind=True)

    def _first_cut(self, seen: Observation, state: PromptState) -> Selection:
        counts = state.notes["first"]
        scores = text_attention(seen)
        vision = vision_attention(seen, mask_padding=False)
        if vision is not None and seen.vision_outside is not None:
            # The release samples a patch at its first pixel and counts a border as wide as a patch to the
            # picture.
            vision = vision.masked_fill(seen.vision_outside > 1, 0.0)
        if vision is not None:
            information = [m / max(rows, 1) for m, rows in zip(*_information(seen), strict=True)]
            weight = TEXT_WEIGHT * torch.tensor(information, device=scores.device)
            scores = vision + weight[:, None] * scores
        return Selection(top_k(required_first(scores, seen), counts, seen.mask), counts)

    def _measure(self, seen: Observation, state: PromptState) -> None:
        information, _ = _information(seen)
        layers = state.shape.num_layers
        fractions, schedule = [], []
        for bits, first, total in zip(
            information, state.notes["first"], state.prompts.num_visual, strict=True
        ):
            if not total:
                fractions.append(np.zeros(layers - 1))
                schedule.append([0] * layers)
                continue
            slope = dynamic_slope(bits, self.k0, self.gamma)
            plan = released_keep_fractions(
                layers, total, self.budget.value, first, self.x0, slope, self.recycle
            )
            fractions.append(plan.fractions)
            counts = released_runtime_counts(first, plan.fractions, total, self.recycle)
            schedule.append(list(counts.entering(total)))
        state.mutual_information = information
        state.schedule = schedule
        state.notes["fractions"] = fractions

    @staticmethod
    def _kept(fractions: np.ndarray, first: int, cut: int, present: int) -> int:
        """Tokens kept after layer cut - 1: the product is taken in float32, as the release does."""
        if not present:
            return 0
        return min(math.ceil(np.float32(first - 1) * np.float32(fractions[cut - 2])), present)


def _information(seen: Observation) -> tuple[list[float], list[int]]:
    """Each prompt's mutual information summed over heads, and its number of text rows."""
    assert seen.attention is not None and seen.text_mask is not None
    rows = seen.text_mask.sum(dim=1).tolist()
    bits = []
    for prompt, (text, visual) in enumerate(zip(rows, seen.counts, strict=True)):
        block = seen.attention[prompt, :, len(seen.text_mask[prompt]) - text :, :visual]
        bits.append(float(released_mutual_information(block).sum()) if text and visual else 0.0)
    return bits, rows
