"""One number per visual token: how much it matters for the prompt."""

from __future__ import annotations

import torch

from ..contract import Observation


def text_attention(seen: Observation, rows: torch.Tensor | None = None) -> torch.Tensor:
    """Attention from the text: mean over heads and over text rows, float32 [batch, V].

    Args:
        rows: bool [batch, text], which of the observed rows; default: all of them but padding.
    """
    attention, text_mask = seen.attention, seen.text_mask if rows is None else rows
    if attention is None or text_mask is None:
        raise ValueError("text attention was not observed: ask for it with Needs(rows='text')")
    if rows is None and seen.no_padding:
        return attention.mean(dim=(1, 2))
    number = text_mask.sum(dim=1).clamp(min=1)
    return (attention.mean(dim=1) * text_mask[:, :, None]).sum(dim=1) / number[:, None]


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
    return scores.where(seen.mask, 0.0) if seen.ragged else scores


def required_vision_attention(seen: Observation) -> torch.Tensor:
    """As `vision_attention`, for methods that rank by nothing else.

    Raises:
        ValueError: the tower gave no scores.
    """
    scores = vision_attention(seen)
    if scores is None:
        raise ValueError(
            "this method ranks by the vision tower's attention, but the tower gave none: the model's "
            "family has none (`autoprune families` says why), or its picture features were not computed "
            "inside the context; "
            "pass vision_scores, or let the model see the pixels"
        )
    return scores


def as_shares(scores: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Scale non-negative scores [batch, V] so that each prompt's sum to 1 over its real tokens.

    Args:
        mask: bool [batch, V], False for padding; None if there is none.
    """
    scores = scores if mask is None else scores.where(mask, 0.0)
    return scores / scores.sum(dim=1, keepdim=True).clamp(min=torch.finfo(scores.dtype).tiny)


def required_vision(seen: Observation, name: str) -> torch.Tensor:
    """What was seen of the vision tower under a name of `Observation`, such as "vision_keys".

    Raises:
        ValueError: the tower gave nothing of that kind.
    """
    values = getattr(seen, name)
    if values is None:
        raise ValueError(
            f"this method needs {name.replace('_', ' ')}, but the tower gave none: the model's family has "
            "none (`autoprune families` says why), or its picture features were not computed inside the "
            "context; let the model see the pixels, or use a method without them, such as divprune or random"
        )
    return values


def real_patches(seen: Observation, values: torch.Tensor) -> torch.Tensor:
    """Which visual tokens show something of the picture, bool [batch, V].

    Not those without a patch (image newlines), where `values` [batch, V] or [batch, V, ...] of the tower
    are NaN, nor patches that hold nothing but the padding of a square-padded picture.
    """
    real = seen.mask & ~values.isnan().reshape(*seen.mask.shape, -1).any(dim=2)
    return real if seen.vision_padding is None else real & ~seen.vision_padding


def text_relevance(
    hidden: torch.Tensor, text: torch.Tensor, text_mask: torch.Tensor, mask: torch.Tensor
) -> torch.Tensor:
    """Cosine between each visual token and the text, mean over its tokens, scaled to [0, 1].

    Args:
        hidden, text: hidden states [batch, V, size] and [batch, text, size].
        text_mask, mask: bool [batch, text] and [batch, V], False for padding.

    Returns:
        float32 [batch, V]: 0 for a prompt's least and 1 for its most relevant token; 1 for all where
        they do not differ.
    """
    number = text_mask.sum(dim=1).clamp(min=1)
    similarity = cosine(hidden, text).to(mask.device)
    similarity = (similarity * text_mask[:, None]).sum(dim=2) / number[:, None]
    low = similarity.masked_fill(~mask, float("inf")).amin(dim=1, keepdim=True)
    span = similarity.masked_fill(~mask, float("-inf")).amax(dim=1, keepdim=True) - low
    return torch.where(span > 0, (similarity - low) / span, 1.0)


def cosine(features: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """Cosine of [batch, V, size] and [batch, W, size], float32 [batch, V, W]."""
    others = torch.nn.functional.normalize(others.float(), dim=-1)
    return torch.nn.functional.normalize(features.float(), dim=-1) @ others.transpose(1, 2)
