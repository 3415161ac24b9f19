"""What is known of each patch of a picture: the attention it gets, and whether it is padding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from .tap import row_attention

# Bounds the memory of one chunk of attention weights (64 MiB in float32).
WEIGHTS_AT_ONCE = 1 << 24


def cls_attention(query: torch.Tensor, key: torch.Tensor, scaling: float | None) -> torch.Tensor:
    """Attention of the CLS token (the first) to the patches behind it, mean over heads.

    Args:
        query, key: [images, heads, 1 + patches, head dim].
        scaling: factor on the scores; None is 1 / sqrt(head dim).

    Returns:
        float32 [images, patches].
    """
    return row_attention(query[:, :, :1], key, scaling).mean(dim=1)[:, 0, 1:]


def received_attention(
    query: torch.Tensor, key: torch.Tensor, scaling: float | None, mask: Any = None
) -> torch.Tensor:
    """Attention that a patch receives: mean over heads and over the patches that may look at it.

    Args:
        query, key: [images, heads, patches, head dim].
        scaling: factor on the scores; None is 1 / sqrt(head dim).
        mask: what the tower gave its attention: None; bool or additive [images or 1, 1, patches,
            patches]; a BlockMask; or the real patches [images, patches]. A patch that may not look
            at itself is padding.

    Returns:
        float32 [images, patches]; 0 for padding.
    """
    images, heads, patches, _ = query.shape
    received = torch.zeros(images, patches, device=query.device)
    senders = torch.zeros_like(received)
    step = max(1, WEIGHTS_AT_ONCE // (images * heads * patches))
    for start in range(0, patches, step):
        rows = query[:, :, start : start + step]
        allowed = _allowed(mask, start, rows.shape[2], images, patches)
        blocked = None if allowed is None else ~allowed[:, None]
        weights = row_attention(rows, key, scaling, blocked).mean(dim=1)
        if allowed is None:
            senders += rows.shape[2]
        else:
            real = allowed.diagonal(start, dim1=1, dim2=2)[..., None]
            senders += (allowed & real).sum(dim=1)
            weights = weights * (allowed & real)
        received += weights.sum(dim=1)
    return received / senders.clamp(min=1)


def _allowed(mask: Any, start: int, rows: int, images: int, patches: int) -> torch.Tensor | None:
    """bool [images or 1, rows, patches]: which patches the rows from `start` on may look at."""
    if mask is None:
        return None
    if hasattr(mask, "mask_mod"):
        picture, head = torch.arange(images)[:, None, None], torch.zeros(1, dtype=torch.long)
        row, column = torch.arange(start, start + rows)[:, None], torch.arange(patches)
        places = [index.to(mask.kv_num_blocks.device) for index in (picture, head, row, column)]
        return mask.mask_mod(*places).expand(images, rows, patches)
    if mask.ndim == 2:
        return mask.bool()[:, None].expand(-1, rows, -1)
    mask = mask[:, 0, start : start + rows, :patches]
    return mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2


def padded_patches(pixels: Any, shape: Sequence[int], patch_size: int) -> torch.Tensor | None:
    """Which patches lie wholly in the constant border that pads a picture to a square.

    Args:
        pixels: [pictures, 3, height, width].
        shape: [pictures, patches], patches in row-major order of a square grid.
        patch_size: pixels along the side of a patch.

    Returns:
        bool [pictures, patches]; None if the pixels do not fit that description. A picture of a
        single colour is not padding.
    """
    if not isinstance(pixels, torch.Tensor) or pixels.ndim != 4 or len(shape) != 2:
        return None
    height, width = pixels.shape[-2:]
    side = height // patch_size
    if height != width or (pixels.shape[0], side * side) != tuple(shape):
        return None
    # Towers leave out pixels at the bottom and right that do not fill a patch.
    rows, columns = (
        _border(view)[:, : side * patch_size].unflatten(1, (side, patch_size)).all(dim=-1)
        for view in (pixels, pixels.transpose(-1, -2))
    )
    padding = (rows[:, :, None] | columns[:, None, :]).flatten(1)
    return padding & ~padding.all(dim=1, keepdim=True)


def _border(pixels: torch.Tensor) -> torch.Tensor:
    """bool [pictures, height]: rows of one colour, unbroken from the top or the bottom edge."""
    flat = (pixels.amax(dim=-1) == pixels.amin(dim=-1)).all(dim=1)
    colour = pixels[..., 0]
    top = flat & (colour == colour[:, :, :1]).all(dim=1)
    bottom = flat & (colour == colour[:, :, -1:]).all(dim=1)
    top = top.to(torch.int8).cummin(dim=1).values.bool()
    bottom = bottom.flip(1).to(torch.int8).cummin(dim=1).values.flip(1).bool()
    return top | bottom
