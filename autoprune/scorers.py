"""One number per visual token: how much it matters for the prompt."""

from __future__ import annotations

import torch

from .method import Observation


def text_attention(seen: Observation) -> torch.Tensor:
    """Attention from the text: mean over heads and over the observed text rows, float32 [batch, V]."""
    attention, text_mask = seen.attention, seen.text_mask
    if attention is None or text_mask is None:
        raise ValueError("text attention was not observed: ask for it with Needs(rows='text')")
    rows = text_mask.sum(dim=1).clamp(min=1)
    return (attention.mean(dim=1) * text_mask[:, :, None]).sum(dim=1) / rows[:, None]


def vision_attention(seen: Observation, mask_padding: bool = True) -> torch.Tensor | None:
    """The vision tower's own scores, float32 [batch, V]; None where the tower gives none.

    Visual tokens without a patch (image newlines) and, with `mask_padding`, patches that hold nothing
    but the padding of a square-padded picture score 0.
    """
    if seen.vision_scores is None:
        return None
    scores = seen.vision_scores.nan_to_num(nan=0.0)
    if mask_padding and seen.vision_padding is not None:
        scores = scores.masked_fill(seen.vision_padding, 0.0)
    return scores.masked_fill(~seen.mask, 0.0)


def required_vision_attention(seen: Observation) -> torch.Tensor:
    """As `vision_attention`, for methods that rank by nothing else.

    Raises:
        ValueError: the tower gave no scores.
    """
    scores = vision_attention(seen)
    if scores is None:
        raise ValueError(
            "this method ranks by the vision tower's attention, but the tower gave none: the model's "
            "family is not in the table, or its picture features were not computed inside the context; "
            "pass vision_scores, or let the model see the pixels"
        )
    return scores


def as_shares(scores: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Scale non-negative scores [batch, V] so that each prompt's sum to 1 over its real tokens."""
    scores = scores.masked_fill(~mask, 0.0)
    return scores / scores.sum(dim=1, keepdim=True).clamp(min=torch.finfo(scores.dtype).tiny)
