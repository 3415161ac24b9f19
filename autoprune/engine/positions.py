"""Positions of the remaining tokens."""

from __future__ import annotations

import torch

from .tokens import Tokens


def compacted_positions(tokens: Tokens) -> torch.Tensor:
    """Positions 0, 1, ... over the real tokens of each prompt, [batch, n]."""
    return ((tokens.column >= 0).cumsum(dim=1) - 1).clamp(min=0)


def take_columns(values: torch.Tensor, column: torch.Tensor, dim: int) -> torch.Tensor:
    """Entries of `values` [..., batch or 1, S, features] at `column` [batch, n], all of them columns."""
    column = column.to(values.device)
    if values.shape[dim - 1] == 1 and column.shape[0] == 1:
        return values.index_select(values.ndim + dim, column[0])
    values = values.expand(*values.shape[: dim - 1], column.shape[0], *values.shape[dim:])
    index = column[..., None].expand(*values.shape[:dim], column.shape[1], values.shape[-1])
    return values.gather(dim, index)
