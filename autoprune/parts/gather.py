"""Tokens by their positions."""

from __future__ import annotations

import torch


def tokens_at(values: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
    """Of [batch, V, size] what stands at positions [batch, K], which are 0 or more: [batch, K, size]."""
    return values.gather(1, position[..., None].expand(-1, -1, values.shape[2]))
