"""What is known of each patch of a picture: the attention it gets, and whether it is padding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..attention.row_attention import row_attention

# Resizing blurs a picture's edge over about this many rows of pixels; where it was is then known to a tenth
# of a row. Padding on both sides differs by a row before the resizing.
BLUR, UNSURE, UNEQUAL = 4, 0.1, 2.0

# Bounds the memory of one chunk of attention weights (64 MiB in float32).
WEIGHTS_AT_ONCE = 1 << 24


def cls_attention(query: Tensor, key: Tensor, scaling: float | None) -> Tensor:
    """Attention of the CLS token (the first) to the patches behind it, mean over heads.

    Args:
        query, key: [images, heads, 1 + patches, head dim].
        scaling: factor on the scores; None is 1 / sqrt(head dim).

    Returns:
        float32 [images, patches].
    """
    return row_attention(query[:, :, :1], key, scaling).mean(dim=1)[:, 0, 1:]


def received_attention(
    query: Tensor, key: Tensor, scaling: float | None, mask: Any = None
) -> Tensor:
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


def _allowed(mask: Any, start: int, rows: int, images: int, patches: int) -> Tensor | None:
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


def padded_patches(pixels: Any, shape: Sequence[int], patch_size: int) -> Tensor | None:
    """Which patches lie wholly in the constant border that pads a picture to a square.

    Args:
        pixels: [pictures, 3, height, width].
        shape: [pictures, patches], patches in row-major order of a square grid.
        patch_size: pixels along the side of a patch.

    Returns:
        bool [pictures, patches]; None if the pixels do not fit that description. A picture of a
        single colour is not padding.
    """
    if not isinstance(pixels, Tensor) or pixels.ndim != 4 or len(shape) != 2:
        return None
    height, width = pixels.shape[-2:]
    side = height // patch_size
    if height != width or (pixels.shape[0], side * side) != tuple(shape):
        return None
    # Towers leave out pixels at the bottom and right that do not fill a patch.
    border = _border(pixels)[..., : side * patch_size].unflatten(-1, (side, patch_size))
    rows, columns = border.all(dim=-1)
    padding = (rows[:, :, None] | columns[:, None, :]).flatten(1)
    return padding.masked_fill(padding.all(dim=1, keepdim=True), False)


def _border(pixels: Tensor) -> Tensor:
    """bool [2, pictures, side]: rows, then columns, of one colour, unbroken from either edge."""
    corners = torch.stack([pixels[:, :, :1, :1], pixels[:, :, -1:, -1:]])
    other = (pixels != corners).any(dim=2)
    broken = torch.stack([other.any(dim=3), other.any(dim=2)])
    # The first edge ends with the first line that is broken, the last one begins behind the last of them.
    first, last = broken.cumsum(dim=-1).unbind(1)
    return (first == 0) | ((last == last[..., -1:]) > broken[:, 1])


def patches_outside(pixels: Tensor, patch_size: int) -> Tensor:
    """How far outside of its picture each patch begins, where the picture was padded to a square.

    Padding lies on both sides of a picture along one axis, in one colour and equally wide. So where one of
    two opposite borders is wider, it goes on into the picture. Borders along both axes are a frame that
    belongs to the picture.

    Args:
        pixels: [pictures, 3, side, side].
        patch_size: pixels along the side of a patch.

    Returns:
        float32 [pictures, patches], row-major: how far the first row (or column) of a patch's pixels is
        from the nearest of the picture, in patches; 0 inside of it.
    """
    along = [_rows_outside(view.float(), patch_size) for view in (pixels, pixels.transpose(-1, -2))]
    is_padded = [(distance > 0).any(dim=1, keepdim=True) for distance in along]
    rows, columns = (distance.masked_fill(is_padded[0] & is_padded[1], 0) for distance in along)
    return torch.maximum(rows[:, :, None], columns[:, None, :]).flatten(1)


def _rows_outside(pixels: Tensor, patch_size: int) -> Tensor:
    """float32 [pictures, rows of patches]: how far each begins above or below the picture, in patches."""
    side = pixels.shape[-2]
    contrast = (pixels - pixels[:, :, :1, :1]).abs().mean(dim=(1, 3))
    edges, sharp = zip(_edge(contrast), _edge(contrast.flip(1)), strict=True)
    narrow = torch.minimum(*edges)
    above, below = (torch.where(e - narrow > UNEQUAL, narrow, e)[:, None] for e in edges)
    # A blurred edge lies between pixels. A sharp one has the picture's last row in front of it.
    last = torch.where((sharp[0] & sharp[1])[:, None], 1.0, -UNSURE)
    first = torch.where(last > 0, 0.0, -UNSURE)
    start = patch_size * torch.arange(side // patch_size, device=pixels.device)
    outside = torch.maximum(above - start + first, start - (side - below) + last)
    return outside.masked_fill(narrow[:, None] == 0, 0).clamp(min=0) / patch_size


def _edge(contrast: Tensor) -> tuple[Tensor, Tensor]:
    """Where the picture begins behind a border, and whether it does so sharply, float and bool [pictures].

    Resizing blurs an edge; it is where half of the contrast is reached, between the middles of two rows.

    Args:
        contrast: [pictures, rows], to the colour of the border. An edge at 0 means that there is none.
    """
    row = torch.arange(contrast.shape[1], device=contrast.device)
    border = (contrast == 0).to(torch.int8).cummin(dim=1).values.sum(dim=1, keepdim=True)
    near = (row >= border) & (row < border + BLUR)
    inside = contrast.masked_fill(~near, 0.0).amax(dim=1, keepdim=True)
    first = (near & (2 * contrast >= inside)).to(torch.int8).argmax(dim=1, keepdim=True)
    share, before = (contrast.gather(1, at) / inside for at in (first, (first - 1).clamp(min=0)))
    between = first + 0.5 - (share - 0.5) / (share - before)
    sharp = first == border
    edge = torch.where(sharp, border.float(), between)
    return torch.where(border * inside > 0, edge, 0.0)[:, 0], sharp[:, 0]
