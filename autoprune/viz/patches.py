"""The picture with what was kept of it at several depths."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ..trace import Sample
from .style import FAINT, INK, PAPER, rgb, theme

GAP = 12
_VEIL, _TINT = 0.80, 0.55


def kept_patches(
    image: Image.Image,
    sample: Sample,
    grid: tuple[int, int] | None = None,
    layers: Sequence[int] | None = None,
    size: int = 200,
    title: str = "",
) -> Image.Image:
    """The whole picture beside what is left of it at several depths.

    Dropped patches are veiled, the border between kept and dropped ones is drawn. Merged tokens
    stand for many patches and are counted in the caption only.

    Args:
        image: the picture as the model saw it: resized, cropped or padded in the same way.
        sample: the prompt's record, `trace.samples[i]`.
        grid: rows and columns of visual tokens, row-major; default: a square, of a prompt with one picture.
        layers: depths to show; default: `default_layers`.
        size: longer side of one panel, in pixels.
        title: a line above the panels, shortened to their width.

    Raises:
        ValueError: an argument is something else, the grid does not hold the prompt's visual tokens, the
            prompt has several pictures, or there is no such layer.
    """
    _check_kinds(image, sample)
    if grid is None:
        _check_single(sample)
    rows, columns = square_grid(sample.num_visual) if grid is None else grid
    if rows * columns != sample.num_visual:
        raise ValueError(
            f"a grid of {rows} x {columns} patches does not hold {sample.num_visual} visual "
            "tokens; pass the grid of this model"
        )
    depth = len(sample.kept)
    layers = default_layers(depth) if layers is None else layers
    if any(not 0 <= layer < depth for layer in layers):
        raise ValueError(f"layers must be between 0 and {depth - 1}, got {list(layers)}")
    scale = size / max(image.size)
    width, height = (max(1, round(side * scale)) for side in image.size)
    full = image.convert("RGB").resize((width, height), Image.Resampling.BICUBIC)
    panels = [(full, f"all {sample.num_visual} patches")]
    for layer in layers:
        kept = np.zeros(rows * columns, dtype=bool)
        kept[sample.kept[layer].numpy()] = True
        panels.append((veiled(full, kept.reshape(rows, columns)), caption(sample, layer)))
    return _row(panels, title)


def _check_kinds(image: Any, sample: Any) -> None:
    if not isinstance(image, Image.Image):
        opened = (
            f"Image.open({image!r})" if isinstance(image, str) else "Image.open or Image.fromarray"
        )
        raise ValueError(
            f"kept_patches needs a PIL image, got {type(image).__name__}; pass what {opened} gives"
        )
    if not isinstance(sample, Sample):
        raise ValueError(
            f"kept_patches needs the record of one prompt, got {type(sample).__name__}; pass trace.samples[0]"
        )


def _check_single(sample: Sample) -> None:
    """Raise ValueError if the prompt's visual tokens are several pictures, with something between them.

    Rows of one picture may stand apart, too: as many of them as each is long.
    """
    position = sample.visual_positions.numpy()
    starts = np.flatnonzero(np.diff(position, prepend=-2) != 1)
    pieces = np.diff([*starts, len(position)]).tolist()
    if len(pieces) > 1 and pieces != [len(pieces)] * len(pieces):
        sizes = ", ".join(map(str, pieces[:6])) + (", ..." if len(pieces) > 6 else "")
        raise ValueError(
            f"the prompt's {sample.num_visual} visual tokens stand in {len(pieces)} pieces ({sizes}), such as "
            "several pictures, and kept_patches draws one; if it is one, pass grid=(rows, columns)"
        )


def default_layers(num_layers: int) -> list[int]:
    """Entering layer 1, the middle and the last layer."""
    return sorted({min(1, num_layers - 1), num_layers // 2, num_layers - 1})


def square_grid(num_visual: int) -> tuple[int, int]:
    """Rows and columns of a square of patches; a ValueError if it is none."""
    side = math.isqrt(num_visual)
    if num_visual == 0 or side * side != num_visual:
        raise ValueError(
            f"{num_visual} visual tokens are no square of patches; pass grid=(rows, columns)"
        )
    return side, side


def tile(pictures: Sequence[Image.Image], columns: int = 1) -> Image.Image:
    """Pictures below each other, column by column, in cells of the largest one's size."""
    width = max(picture.width for picture in pictures)
    height = max(picture.height for picture in pictures)
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (columns * width, rows * height), PAPER)
    for index, picture in enumerate(pictures):
        sheet.paste(picture, (index // rows * width, index % rows * height))
    return sheet


def caption(sample: Sample, layer: int) -> str:
    """How many patches and merged tokens enter a layer."""
    kept = sample.kept[layer].tolist()
    patches = len(kept)
    if sample.summary_token in kept and patches < sample.num_visual:
        return f"into layer {layer}: {patches - 1} + summary"
    merged = sample.tokens_per_layer[layer] - patches
    return f"into layer {layer}: {patches}" + (f" + {merged} merged" if merged else "")


def veiled(
    full: Image.Image, kept: np.ndarray, dark: bool = False, tint: str | None = None
) -> Image.Image:
    """`full` with dropped patches of `kept` [rows, columns] veiled, and the border drawn.

    Args:
        tint: a colour that the dropped patches get instead of the paper's.
    """
    look = theme(dark)
    veil = np.asarray(rgb(tint or look.paper), np.float32)
    width, height = full.size
    rows, columns = kept.shape
    down = np.minimum(np.arange(height) * rows // height, rows - 1)
    right = np.minimum(np.arange(width) * columns // width, columns - 1)
    inside = kept[down[:, None], right[None, :]]
    pixels = np.asarray(full, dtype=np.float32)
    grey = pixels.mean(axis=2, keepdims=True)
    pixels = np.where(inside[..., None], pixels, grey + (_TINT if tint else _VEIL) * (veil - grey))
    picture = Image.fromarray(pixels.round().astype(np.uint8))
    _draw_border(picture, kept, rgb(look.ink))
    return picture


def _draw_border(picture: Image.Image, kept: np.ndarray, ink: tuple[int, int, int]) -> None:
    pen = ImageDraw.Draw(picture)
    rows, columns = kept.shape
    ring = np.pad(kept, 1)
    x = [min(-(-picture.width * c // columns), picture.width - 1) for c in range(columns + 1)]
    y = [min(-(-picture.height * r // rows), picture.height - 1) for r in range(rows + 1)]
    for row, column in np.argwhere(ring[1:, 1:-1] != ring[:-1, 1:-1]):
        pen.line([x[column], y[row], x[column + 1], y[row]], fill=ink, width=2)
    for row, column in np.argwhere(ring[1:-1, 1:] != ring[1:-1, :-1]):
        pen.line([x[column], y[row], x[column], y[row + 1]], fill=ink, width=2)


def _row(panels: Sequence[tuple[Image.Image, str]], title: str) -> Image.Image:
    """Panels side by side, each above its caption."""
    width, height = panels[0][0].size
    heading, small = font(17), font(14)
    top = GAP + (28 if title else 0)
    total = GAP + len(panels) * (width + GAP)
    while title and heading.getlength(title) > total - 2 * GAP:
        shorter = title.removesuffix("...")[:-1].rstrip()
        title = shorter + "..." if shorter else ""
    sheet = Image.new("RGB", (total, top + height + 24 + GAP), PAPER)
    pen = ImageDraw.Draw(sheet)
    pen.text((GAP, GAP), title, fill=INK, font=heading)
    for index, (panel, text) in enumerate(panels):
        left = GAP + index * (width + GAP)
        sheet.paste(panel, (left, top))
        pen.text((left, top + height + 4), text, fill=FAINT, font=small)
    return sheet


def font(size: int) -> Any:
    return ImageFont.load_default(size=size)
