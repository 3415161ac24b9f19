"""What is kept of the pictures over depth: a strip over chosen layers, and an animation over all."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from ..trace import Sample
from .patches import GAP, caption, default_layers, font, veiled
from .style import COLOURS, new_figure, rgb, theme
from .views import View

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST_VIEWS = 6
"""Frames and tiles that a strip has room for; of more, evenly spaced ones are drawn."""

_PANEL = 320  # pixels of a panel's longer side
_INCHES = 2.0  # of a panel's width
_LINE = 64  # letters that fit into one line of a title

Bools = NDArray[np.bool_]


def kept_over_depth(
    views: Sequence[View],
    sample: Sample,
    layers: Sequence[int] | None = None,
    title: str = "",
    dark: bool = False,
) -> Figure:
    """The pictures, and beside them what is left of each at several depths.

    Dropped patches are veiled, the border between kept and dropped ones is drawn. Merged tokens stand for
    many patches and are counted in the caption only.

    Args:
        views: what the decoder sees; a row of panels for each, see `views_of` and `View.whole`.
        sample: the prompt's record, `trace.samples[i]`.
        layers: depths to show; default: `default_layers`.
        title: a line above, shortened to its width.
        dark: light text on dark paper.

    Raises:
        ImportError: matplotlib is missing.
        ValueError: there is no such layer, or the views hold other tokens than the prompt.
    """
    layers = check_layers(layers, len(sample.kept))
    check_tokens(views, sample.num_visual)
    captions = [caption(sample, layer) for layer in layers]

    def panel(view: View, layer: int) -> Image.Image:
        return veiled(sized(view.image, _PANEL), _kept_of(view, sample, layer), dark)

    return strip(views, layers, captions, panel, f"all {sample.num_visual} patches", title, dark)


def summary_over_depth(
    views: Sequence[View],
    sample: Sample,
    layers: Sequence[int] | None = None,
    dark: bool = False,
) -> Figure:
    """What the summary of the dropped tokens stands for at several depths.

    The patches that it stands for are tinted. A frame is around the one whose place it takes.

    Args:
        views, sample, layers, dark: as for `kept_over_depth`.

    Raises:
        ImportError: matplotlib is missing.
        ValueError: the prompt has no summary, there is no such layer, or the views hold other tokens.
    """
    if sample.summary_token is None:
        raise ValueError(
            'the prompt has no summary of its dropped tokens; prune it with merger="summary", under a budget '
            "that drops some"
        )
    token = sample.summary_token
    layers = check_layers(layers, len(sample.kept))
    check_tokens(views, sample.num_visual)
    captions = [_stands_for(sample, layer) for layer in layers]

    def panel(view: View, layer: int) -> Image.Image:
        kept = _kept_of(view, sample, layer)
        whole = len(sample.kept[layer]) == sample.num_visual
        place = view.tokens == token
        picture = veiled(sized(view.image, _PANEL), kept & (whole | ~place), dark, COLOURS[1])
        return picture if whole else _framed(picture, place)

    title = "tinted: in the summary token; framed: its place"
    return strip(views, layers, captions, panel, f"all {sample.num_visual} patches", title, dark)


def animate_kept(
    views: Sequence[View],
    sample: Sample,
    size: int = 320,
    milliseconds: int = 400,
    dark: bool = False,
) -> bytes:
    """An animated WebP: what enters each layer, one frame a layer, over and over.

    Args:
        views, sample, dark: as for `kept_over_depth`; views stand side by side.
        size: longer side of one view, in pixels.
        milliseconds: for each layer.

    Raises:
        ValueError: the views hold other tokens than the prompt.
    """
    frames = [kept_at_layer(views, sample, layer, size, dark) for layer in range(len(sample.kept))]
    buffer = io.BytesIO()
    frames[0].save(
        buffer,
        format="WEBP",
        save_all=True,
        append_images=frames[1:],
        duration=milliseconds,
        loop=0,
        quality=85,
    )
    return buffer.getvalue()


def kept_at_layer(
    views: Sequence[View], sample: Sample, layer: int, size: int = 320, dark: bool = False
) -> Image.Image:
    """The pictures with what enters one layer, side by side above a line of words.

    Args:
        views, sample, dark: as for `kept_over_depth`.
        layer: which one, from 0.
        size: longer side of one view, in pixels.

    Raises:
        ValueError: there is no such layer, or the views hold other tokens than the prompt.
    """
    check_layers([layer], len(sample.kept))
    check_tokens(views, sample.num_visual)
    panels = [
        veiled(sized(view.image, size), _kept_of(view, sample, layer), dark) for view in some(views)
    ]
    return _side_by_side(panels, caption(sample, layer), dark)


def strip(
    views: Sequence[View],
    layers: Sequence[int],
    captions: Sequence[str],
    panel: Callable[[View, int], Image.Image],
    first: str,
    title: str,
    dark: bool,
) -> Figure:
    """The whole pictures under the caption `first`, then a column of panels for each layer."""
    shown = some(views)
    heights = [view.image.height / view.image.width * _INCHES for view in shown]
    figure = new_figure(
        _INCHES * (1 + len(layers)) + 0.2, sum(heights) + 0.7 + 0.1 * len(shown), dark
    )
    cells = figure.subplots(len(shown), 1 + len(layers), squeeze=False, height_ratios=heights)
    for view, row in zip(shown, cells, strict=True):
        show_picture(row[0], view.image)
        for axes, layer in zip(row[1:], layers, strict=True):
            show_picture(axes, panel(view, layer))
    for axes, text in zip(cells[-1], (first, *captions), strict=True):
        axes.set_xlabel(text, color=theme(dark).ink, fontsize=9)
    if len(shown) < len(views):
        title = f"{len(shown)} of {len(views)} pictures. {title}".rstrip()
    if title:
        most = max(24, round(_LINE * (1 + len(layers)) / 4))
        # A dollar sign would begin a formula.
        short = title if len(title) <= most else title[: most - 3].rstrip() + "..."
        figure.suptitle(short.replace("$", r"\$"), color=theme(dark).ink, fontsize=11)
    return figure


def show_picture(axes: Any, image: Image.Image) -> None:
    axes.imshow(np.asarray(image.convert("RGB")))
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_visible(False)


def sized(image: Image.Image, longer: int) -> Image.Image:
    """The picture in colour, with a longer side of so many pixels."""
    scale = longer / max(image.size)
    width, height = (max(1, round(side * scale)) for side in image.size)
    return image.convert("RGB").resize((width, height), Image.Resampling.BICUBIC)


def some(views: Sequence[View]) -> list[View]:
    """At most `MOST_VIEWS`, evenly spaced, the first and the last among them."""
    if len(views) <= MOST_VIEWS:
        return list(views)
    return [views[round(i * (len(views) - 1) / (MOST_VIEWS - 1))] for i in range(MOST_VIEWS)]


def check_layers(layers: Sequence[int] | None, depth: int) -> list[int]:
    """The layers asked for, or `default_layers`.

    Raises:
        ValueError: there is no such layer, or none is asked for.
    """
    chosen = default_layers(depth) if layers is None else list(layers)
    if not chosen or any(not 0 <= layer < depth for layer in chosen):
        raise ValueError(f"layers must be between 0 and {depth - 1}, got {chosen}")
    return chosen


def check_tokens(views: Sequence[View], num_visual: int) -> None:
    """Raise ValueError where the views hold tokens that the prompt has not, or no view is given."""
    largest = max((int(view.tokens.max()) for view in views), default=-1)
    if largest < 0 or largest >= num_visual:
        raise ValueError(
            f"the views hold visual tokens up to number {largest}, and the prompt has {num_visual}; make them "
            "from the same prompt"
        )


def _kept_of(view: View, sample: Sample, layer: int) -> Bools:
    """bool [rows, columns]: which places of a view hold a token that enters the layer."""
    kept = np.zeros(sample.num_visual, dtype=bool)
    kept[sample.kept[layer].numpy()] = True
    return view.of_tokens(kept, False).astype(bool)


def _stands_for(sample: Sample, layer: int) -> str:
    entering = sample.tokens_per_layer[layer]
    if entering == sample.num_visual:
        return f"into layer {layer}: none dropped yet"
    return f"into layer {layer}: for {sample.num_visual - entering + 1} of {sample.num_visual}"


def _framed(picture: Image.Image, place: Bools) -> Image.Image:
    """A frame around one place of the grid, if it is in this picture."""
    for row, column in np.argwhere(place):
        rows, columns = place.shape
        left, right = (column + i for i in (0, 1))
        box = [
            left * picture.width // columns,
            row * picture.height // rows,
            right * picture.width // columns - 1,
            (row + 1) * picture.height // rows - 1,
        ]
        ImageDraw.Draw(picture).rectangle(box, outline=rgb(COLOURS[0]), width=3)
    return picture


def _side_by_side(panels: Sequence[Image.Image], text: str, dark: bool) -> Image.Image:
    """Panels in a row above one caption."""
    look, height = theme(dark), max(panel.height for panel in panels)
    width = GAP + sum(panel.width + GAP for panel in panels)
    sheet = Image.new("RGB", (width, GAP + height + 28), rgb(look.paper))
    left = GAP
    for panel in panels:
        sheet.paste(panel, (left, GAP))
        left += panel.width + GAP
    pen = ImageDraw.Draw(sheet)
    pen.text((GAP, GAP + height + 5), text, fill=rgb(look.ink), font=font(14))
    return sheet
