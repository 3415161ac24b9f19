"""Positions of the remaining tokens."""

from __future__ import annotations

import torch

from ..tokens.present import Tokens


def compacted_positions(tokens: Tokens) -> torch.Tensor:
    """Positions 0, 1, ... over the real tokens of each prompt, [batch, n]."""
    return ((tokens.column >= 0).cumsum(dim=1) - 1).clamp(min=0)


def take_columns(values: torch.Tensor, column: torch.Tensor, dim: int) -> torch.Tensor:
    """Entries at `column` [batch, n], each of them one of the S.

    Args:
        values: [..., batch or 1, S], or with features behind it.
        dim: where S is: -1, or -2 with features.
    """
    column = column.to(values.device)
    if values.shape[dim - 1] == 1 and column.shape[0] == 1:
        # A CPU is several times slower where a dimension of length 1 stands in the middle.
        return values.squeeze(dim - 1).index_select(dim, column[0]).unsqueeze(dim - 1)
    shape = *values.shape[: dim - 1], *column.shape
    index = (
        column.expand(shape) if dim == -1 else column[..., None].expand(*shape, values.shape[-1])
    )
    values = values.expand(*values.shape[: dim - 1], column.shape[0], *values.shape[dim:])
    return values.gather(dim, index)
