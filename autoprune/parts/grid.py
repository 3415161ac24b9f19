"""The pictures' grids, divided into cells of like size."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .gather import tokens_at
from .transfer import to_device


def grid_cells(
    places: torch.Tensor | None, counts: Sequence[int], mask: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Divide the pictures of each prompt into as many cells of like size as tokens are to be left.

    Pictures share the cells in proportion to their tokens. A picture of R x C tokens is cut into about
    sqrt(cells R / C) bands of rows, and each band into its share of the cells.

    Args:
        places: [batch, V, 3], picture, row and column of each token, as in `Observation.places`; None
            takes the tokens of a prompt as one long row.
        counts: cells of each prompt; no more than it has tokens with a place.
        mask: bool [batch, V], False for padding.

    Returns:
        cell: LongTensor [batch, V], 0, 1, ... within a prompt; -1 for tokens without a place.
        middle: bool [batch, V], the token in the middle of each cell.
    """
    if places is None:
        column = torch.arange(mask.shape[1], device=mask.device).expand(mask.shape)
        places = torch.stack([torch.zeros_like(column)] * 2 + [column], dim=2).float()
    placed = mask & ~places.isnan().any(dim=2)
    order = placed.sort(dim=1, descending=True, stable=True).indices
    picture, row, column = tokens_at(places.nan_to_num(0.0).long(), order).unbind(dim=2)
    here = placed.gather(1, order)
    changes = torch.nn.functional.pad(picture[:, 1:] != picture[:, :-1], (1, 0))
    picture = changes.cumsum(dim=1)  # numbered within the prompt

    def per_picture(values: torch.Tensor, how: str) -> torch.Tensor:
        """Sum or largest of `values` [batch, V] over a token's picture, for each token."""
        values = values.masked_fill(~here, 0)
        return torch.zeros_like(values).scatter_reduce(1, picture, values, how).gather(1, picture)

    everything = here.sum(dim=1, keepdim=True)
    cells = torch.minimum(to_device(list(counts), mask.device)[:, None], everything)
    size = per_picture(torch.ones_like(row), "sum")
    rows, columns = (per_picture(axis + 1, "amax").clamp(min=1) for axis in (row, column))
    start = torch.searchsorted(picture.contiguous(), picture.contiguous())
    everything = everything.clamp(min=1)
    first = start * cells // everything
    own = (start + size) * cells // everything - first
    shown, own = here & (own > 0), own.clamp(min=1)
    bands = ((own * rows).double() / columns).sqrt().round().long()
    bands = torch.minimum(torch.maximum(bands, -(-own // columns)), torch.minimum(rows, own))
    band, in_middle_row = _slot(row, rows, bands)
    before = band * own // bands
    slot, in_middle_column = _slot(column, columns, (band + 1) * own // bands - before)
    cell = torch.where(shown, first + before + slot, -1)
    middle = shown & in_middle_row & in_middle_column
    back = order.argsort(dim=1)
    return cell.gather(1, back), middle.gather(1, back)


def _slot(
    index: torch.Tensor, length: torch.Tensor, slots: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of `slots` like stretches of 0 .. length - 1, which one holds `index`, and is it in the middle."""
    slot = index * slots // length
    first, behind = -(-slot * length // slots), -(-(slot + 1) * length // slots)
    return slot, index == (first + behind - 1) // 2
