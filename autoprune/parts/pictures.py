"""The pictures of a prompt, and a ranking that gives each of them its quota."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from .transfer import to_device


def picture_of(index: torch.Tensor, sizes: Sequence[Sequence[int]]) -> torch.Tensor:
    """The number of each token's picture, LongTensor [batch, V]; P for tokens of none.

    Args:
        index: LongTensor [batch, V], original visual index; below 0 for merged tokens and padding.
        sizes: visual tokens of each prompt's pictures; P is the largest number of pictures.
    """
    most = max(map(len, sizes), default=0)
    ends = np.full((len(sizes), most), np.iinfo(np.int64).max)
    for row, own in zip(ends, sizes, strict=True):
        row[: len(own)] = np.cumsum(own)
    found = torch.searchsorted(to_device(ends, index.device), index.contiguous(), right=True)
    return found.masked_fill(index < 0, most)


def totals(values: torch.Tensor, picture: torch.Tensor, pictures: int) -> torch.Tensor:
    """The sum of a prompt's values [batch, V] over each of its pictures, [batch, P]."""
    sums = values.new_zeros(len(values), pictures + 1)
    return sums.scatter_add_(1, picture, values)[:, :pictures]


def by_picture(scores: torch.Tensor, picture: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
    """Scores whose best n hold of each picture what it is due, for every n; float32 [batch, V].

    The k-th best token of a picture with share w ranks by (k - 1/2) / w, and equal ones by their scores. So
    the best n are a water filling: a picture has min(w t, its tokens), rounded, at the level t where these sum
    to n (Webster's method, which never takes from a picture as n grows). Pictures without a share come last.

    Args:
        scores: [batch, V].
        picture: LongTensor [batch, V], as of `picture_of`. Tokens of no picture come first.
        shares: float [batch, P], 0 or more, of any scale.
    """
    width = scores.shape[1]
    every = torch.arange(width, device=scores.device).expand_as(picture)
    best = scores.sort(dim=1, descending=True, stable=True).indices
    # From here on tokens stand in the order of their scores.
    own = picture.gather(1, best)
    grouped = own.sort(dim=1, stable=True)
    count = every.new_zeros(len(own), shares.shape[1] + 1).scatter_add_(
        1, own, torch.ones_like(own)
    )
    place = every - (count.cumsum(dim=1) - count).gather(1, grouped.values)
    place = torch.empty_like(place).scatter_(1, grouped.indices, place)
    # What has no picture stands before all that have one.
    share = torch.nn.functional.pad(shares.float(), (0, 1), value=float("inf"))
    share = share.nan_to_num(nan=0.0, posinf=float("inf"))
    due = ((place + 0.5) / share.gather(1, own)).sort(dim=1, stable=True).indices
    ranked = torch.empty(scores.shape, dtype=torch.float32, device=scores.device)
    return ranked.scatter_(1, best.gather(1, due), (width - every).float())
