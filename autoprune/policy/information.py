"""Mutual information between text and visual tokens, read from an attention block.

The text-to-visual attention of one head, `attention[text, visual]`, is taken as an unnormalised
joint distribution of "which text token asks" and "which visual token answers". Its mutual
information measures how much the place that is looked at depends on the token that looks: large where
each word knows its place, zero when all text tokens look alike. AutoPrune (NeurIPS 2025) turns it into
the slope of the retention curve: an easy prompt has much of it, a hard one little.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

RELEASED_EPSILON = 1e-6


@torch.no_grad()
def mutual_information(
    attention: Tensor, text_mask: Tensor | None = None, visual_mask: Tensor | None = None
) -> Tensor:
    """Mutual information in bits of each head's text-to-visual attention.

    With p the block divided by its sum, p_i and p_j its marginals: `I = sum_ij p_ij log2(p_ij /
    (p_i p_j))`, where 0 log 0 = 0 (AutoPrune, normalised joint of the paper). The value lies in [0,
    log2 min(text, visual)] and depends neither on the attention's overall mass nor on the order of
    tokens. A block without any mass gives 0. It is measured, not differentiated: no gradient flows.

    Args:
        attention: non-negative weights `[..., heads, text, visual]`, or `[text, visual]` for a
            single block.
        text_mask: bool `[..., text]`, False for rows to leave out (padding); None keeps all.
        visual_mask: bool `[..., visual]`, False for columns to leave out; None keeps all.

    Returns:
        Bits, `[..., heads]`, float32 (float64 if `attention` is float64).

    Raises:
        ValueError: `attention` has fewer than two dimensions, or a mask does not fit it or is not
            bool.
    """
    if attention.dim() < 2:
        raise ValueError(
            f"attention must be [..., text, visual], got {attention.dim()} dimension(s); "
            "pass the attention weights themselves, not their mean over text or visual tokens"
        )
    block = attention if attention.dtype == torch.float64 else attention.float()
    if text_mask is not None:
        block = block.where(_fit_mask(text_mask, attention, "text_mask", -2), 0.0)
    if visual_mask is not None:
        block = block.where(_fit_mask(visual_mask, attention, "visual_mask", -1), 0.0)

    mass = block.sum(dim=(-2, -1), keepdim=True)
    joint = block / mass.clamp_min(torch.finfo(mass.dtype).tiny)
    text_marginal = joint.sum(dim=-1, keepdim=True)
    visual_marginal = joint.sum(dim=-2, keepdim=True)
    tiny = torch.finfo(joint.dtype).tiny
    # The smallest normal number stands in for a product that underflows; such pairs weigh < 1e-18.
    independent = (text_marginal * visual_marginal).clamp_min_(tiny)
    # Where the joint is 0 so is the term, as the logarithm is kept finite.
    logarithm = torch.div(joint, independent, out=independent).clamp_min_(tiny).log_()
    nats = joint.mul_(logarithm).sum(dim=(-2, -1))
    return (nats / math.log(2.0)).clamp_min(0.0)


@torch.no_grad()
def visual_spread(
    attention: Tensor, text_mask: Tensor | None = None, visual_mask: Tensor | None = None
) -> Tensor:
    """How far the text's attention is spread over the visual tokens, its mean over heads and text rows.

    With p that mean, divided by its sum over the visual tokens: the participation ratio 1 / sum p^2, in tokens,
    and the entropy -sum p log2 p, in bits. All attention on one token gives 1 and 0; evenly on V tokens, V and
    log2 V. A block without any mass gives 0 and 0.

    Args:
        attention, text_mask, visual_mask: as for `mutual_information`, with heads.

    Returns:
        `[..., 2]`, float32 (float64 if `attention` is float64).
    """
    block = attention if attention.dtype == torch.float64 else attention.float()
    if text_mask is not None:
        block = block.where(_fit_mask(text_mask, attention, "text_mask", -2), 0.0)
    if visual_mask is not None:
        block = block.where(_fit_mask(visual_mask, attention, "visual_mask", -1), 0.0)
    mass = block.sum(dim=(-3, -2))
    tiny = torch.finfo(mass.dtype).tiny
    p = mass / mass.sum(dim=-1, keepdim=True).clamp_min(tiny)
    square = (p * p).sum(dim=-1)
    participation = torch.where(square > 0, 1 / square.clamp_min(tiny), 0.0)
    return torch.stack((participation, -(p * p.clamp_min(tiny).log2()).sum(dim=-1)), dim=-1)


def released_mutual_information(attention: Tensor) -> Tensor:
    """The released AutoPrune code's estimate, per head, in bits and in the tensor's own dtype.

    With `q = attention / T` for T text rows and `m_j = sum_i q_ij`: `sum_ij q_ij log2(max(q_ij /
    (m_j / T + 1e-6), 1e-6))`. Rows are not renormalised over the visual columns and the text prior
    is uniform, so the value grows with the attention mass on the image and is slightly negative for
    identical rows.

    Args:
        attention: softmax weights `[..., text, visual]`.

    Returns:
        `[...]`, one value per block.

    Raises:
        ValueError: `attention` has fewer than two dimensions or no text row.
    """
    if attention.dim() < 2 or attention.shape[-2] == 0:
        raise ValueError(
            "attention must be [..., text, visual] with at least one text row, "
            f"got {list(attention.shape)}; place text after the image"
        )
    num_text = attention.shape[-2]
    joint = attention / num_text
    visual_marginal = joint.sum(dim=-2, keepdim=True)
    ratio = joint / (visual_marginal / num_text + RELEASED_EPSILON)
    return (joint * torch.log2(ratio.clamp_min(RELEASED_EPSILON))).sum(dim=(-2, -1))


def _fit_mask(mask: Tensor, attention: Tensor, name: str, dim: int) -> Tensor:
    """Shapes `mask [..., tokens]` so that it broadcasts against `attention [..., heads, text,
    visual]`.
    """
    expected = (*attention.shape[:-3], attention.shape[dim])
    if mask.dtype != torch.bool or tuple(mask.shape) != expected:
        raise ValueError(
            f"{name} must be a bool tensor of shape {list(expected)} for attention of shape "
            f"{list(attention.shape)}, got {mask.dtype} {list(mask.shape)}; True marks used tokens"
        )
    if attention.dim() > 2:
        mask = mask.unsqueeze(-2)
    return mask.unsqueeze(-1 if dim == -2 else -2)
