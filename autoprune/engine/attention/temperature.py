"""Attention whose temperature follows from a token's position, counted by the attention itself (Llama 4).

It counts the tokens that it is given. Behind a cut these are fewer, so it scales their queries for positions
that are too small. Here they are scaled for the right ones.
"""

from __future__ import annotations

from typing import Any

import torch


def counts_positions(attention: Any) -> bool:
    """Whether a layer's attention counts positions itself."""
    return bool(
        getattr(attention, "attn_temperature_tuning", False)
        and not getattr(attention, "use_rope", False)
    )


def at_positions(
    attention: Any, query: torch.Tensor, counted: torch.Tensor, positions: torch.Tensor
) -> torch.Tensor:
    """Queries [batch, heads, n, size], scaled for the positions they have.

    Args:
        counted, positions: LongTensor [batch or 1, n]: what the attention counted, and what is right.
    """
    factor = _scale(attention, positions) / _scale(attention, counted)
    return (query * factor[:, None, :, None].to(query.device)).to(query.dtype)


def _scale(attention: Any, positions: torch.Tensor) -> torch.Tensor:
    """As `Llama4TextAttention` of transformers has it, after "Scalable-Softmax" (arXiv 2501.19399)."""
    steps = torch.floor((positions.float() + 1.0) / attention.floor_scale)
    return torch.log1p(steps) * attention.attn_scale + 1.0
