"""PACT: one cut in an early layer, that drops the unimportant and clusters the rest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.nn.functional import normalize

from ..contract import Needs, Observation, PromptState, Selection
from ..parts.gather import tokens_at
from ..parts.mergers import absorb, owned
from ..parts.selectors import top_k
from ..parts.transfer import to_device
from .base import AfterLayer

DENSITY_SCALE = 2.0
CUTOFFS, ROUNDS = 32, 3
"""Cutoffs tried at once, and how often the search narrows: 3 / 31^3 = 0.0001 at the end."""


@dataclass(frozen=True)
class PACT(AfterLayer):
    """Drops what the visual tokens attend to least and merges the rest into clusters of similar keys.

    One cut before layer `layer`, from that layer's own keys and queries. Importance (EUTI) is
    mean over heads of softmax_v(k_v . mean query of the visual tokens / sqrt(d)), times the norm of the
    hidden state; the best `important` of the tokens go on. Their clusters (DBDPC): by falling density
    sum_j exp(-(d_ij / 2)^2), with cosine distances d of the keys, a token farther than a cutoff from
    every centre becomes one; the others join the nearest, and so do dropped tokens within `recover`
    cutoffs of it. A cluster becomes the mean of its hidden states, at its centre's place.
    The cutoff is the one whose number of clusters comes closest to the budget's from below, so that a
    prompt may keep a few tokens less than planned; a budget that pays for more than `important` of the
    tokens drops fewer in the first step.
    Differs from the official code: there the cutoff is given (.21) and the number of clusters follows;
    later layers attend in proportion to the clusters' sizes; importance is taken of keys and queries
    before their rotation, over system tokens, too.

    Args:
        budget: a `Budget`, or the mean number of visual tokens entering a layer.
        layer: stated for 32 layers; the official code cuts on entering layer 4, the fifth.
        important: share of the tokens that is clustered, in (0, 1].
        recover: 0 loses all tokens that the first step drops.
        proportional: a merged token counts in the decoder's attention for as many as it is made of: its score
            gets the logarithm of their number (proportional attention, ToMe's equation 1).
    """

    name: ClassVar[str] = "pact"
    paper: ClassVar[str] = (
        "PACT: Pruning and Clustering-Based Token Reduction for Faster Visual Language Models, "
        "CVPR 2025, arxiv.org/abs/2504.08966"
    )
    looks: ClassVar[Needs] = Needs(keys=True, ahead=True, hidden=True)
    merges: ClassVar[bool] = True

    layer: float = 4
    important: float = 0.55
    recover: float = 1.5
    proportional: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.important <= 1:
            raise ValueError(f"important must be a share in (0, 1], got {self.important!r}")
        if not 0 <= self.recover < float("inf"):
            raise ValueError(f"recover must be a number from 0 on, got {self.recover!r}")

    def choose(self, seen: Observation, counts: Sequence[int], state: PromptState) -> Selection:
        assert seen.hidden is not None and seen.keys is not None and seen.queries is not None
        hidden, keys, queries = seen.hidden(), seen.keys().float(), seen.queries().float()
        mask = seen.mask.to(hidden.device)
        first = [
            max(int(self.important * present), target)
            for present, target in zip(seen.counts, counts, strict=True)
        ]
        scores = importance(keys, queries, mask) * hidden.float().norm(dim=2)
        survivors = top_k(scores, first, mask)
        vectors = normalize(keys.transpose(1, 2).flatten(2), dim=2)
        owner = clusters(vectors, survivors, counts, self.recover).masked_fill(~mask, -1)
        is_centre = owner == torch.arange(owner.shape[1], device=owner.device)
        found = is_centre.sum(dim=1).tolist()
        kept = top_k(is_centre.float(), found, mask)
        sizes = owned(kept, owner) if self.proportional else None
        states = absorb(hidden, kept, owner)
        return Selection(kept.to(seen.mask.device), found, states=states, sizes=sizes)


def importance(keys: torch.Tensor, queries: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Attention of the mean query, mean over heads, [batch, V].

    Args:
        keys: [batch, key heads, V, head dim].
        queries: [batch, heads, V, head dim]; heads is a multiple of key heads.
        mask: bool [batch, V].
    """
    batch, heads, _, width = queries.shape
    number = mask.sum(dim=1).clamp(min=1)[:, None, None]
    query = (queries * mask[:, None, :, None]).sum(dim=2) / number
    query = query.view(batch, keys.shape[1], heads // keys.shape[1], width)
    scores = (query @ keys.transpose(2, 3)) * width**-0.5
    scores = scores.masked_fill(~mask[:, None, None], torch.finfo(scores.dtype).min)
    return scores.softmax(dim=3).mean(dim=(1, 2))


def clusters(
    vectors: torch.Tensor, survivors: torch.Tensor, counts: Sequence[int], recover: float
) -> torch.Tensor:
    """The centre of every token's cluster, LongTensor [batch, V], -1 for tokens that are lost.

    Args:
        vectors: unit vectors [batch, V, size].
        survivors: LongTensor [batch, n], ascending positions of the tokens to cluster, -1 is padding.
        counts: at most so many clusters of each prompt.
        recover: other tokens within so many cutoffs of a centre join it.
    """
    real, place = survivors >= 0, survivors.clamp(min=0)
    chosen = tokens_at(vectors, place)
    distance = (1 - chosen @ vectors.transpose(1, 2)).clamp(min=0)
    among = distance.gather(2, place[:, None].expand(-1, place.shape[1], -1))
    closeness = (-((among / DENSITY_SCALE) ** 2)).exp() * real[:, None]
    density = closeness.sum(dim=2).masked_fill(~real, float("-inf"))
    order = density.argsort(dim=1, descending=True, stable=True)
    ordered = tokens_at(among, order)
    ordered = ordered.gather(2, order[:, None].expand_as(among))
    limit = to_device(list(counts), vectors.device)
    picked, cutoff = _search(ordered, real.gather(1, order), limit)
    centre = torch.zeros_like(real).scatter(1, order, picked)

    nearest, which = distance.masked_fill(~centre[..., None], float("inf")).min(dim=1)
    clustered = torch.zeros_like(nearest).scatter_add(1, place, real.float()) > 0
    joins = clustered | (nearest < recover * cutoff[:, None])
    owner = place.gather(1, which).masked_fill(~joins, -1)
    spare = owner.new_full((len(owner), 1), -1)
    # A centre is its own, even where another one has the same key.
    own = torch.where(centre, place, owner.shape[1])
    return torch.cat([owner, spare], dim=1).scatter(1, own, place)[:, :-1]


def _search(
    distance: torch.Tensor, real: torch.Tensor, limit: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The centres, bool [batch, n], and the cutoff [batch] with most of them within `limit` [batch]."""
    # Below zero nothing is near anything, above two everything is.
    low, high = torch.full_like(distance[:, 0, :1], -0.5), torch.full_like(distance[:, 0, :1], 2.5)
    steps = torch.linspace(0, 1, CUTOFFS, device=distance.device)
    for _ in range(ROUNDS):
        cutoffs = low + (high - low) * steps
        found = _centres(distance, real, cutoffs)
        number = found.sum(dim=2)
        best = number.masked_fill(number > limit[:, None], -1).argmax(dim=1, keepdim=True)
        low, high = cutoffs.gather(1, (best - 1).clamp(min=0)), cutoffs.gather(1, best)
    picked = tokens_at(found, best)
    return picked[:, 0], high[:, 0]


def _centres(distance: torch.Tensor, real: torch.Tensor, cutoffs: torch.Tensor) -> torch.Tensor:
    """Which tokens become centres when they take their turn in order, bool [batch, cutoffs, n].

    Args:
        distance: [batch, n, n], tokens in the order of their turns.
        real: bool [batch, n].
        cutoffs: [batch, cutoffs].
    """
    free = real[:, None].repeat(1, cutoffs.shape[1], 1)
    for turn in range(real.shape[1] - 1):
        near = distance[:, turn, None, turn + 1 :] <= cutoffs[..., None]
        free[..., turn + 1 :] &= ~(near & free[..., turn, None])
    return free
