"""How many tokens of each of several pictures are kept, for models whose tokens have no places in a picture."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from PIL import Image

from ..trace import Sample
from .style import COLOURS, new_figure, style_axes, theme

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CAPTION = "Tokens of each picture that enter each layer. A token is no patch here, so no patches are drawn."
_COLUMNS = 3


def kept_by_view(
    images: Sequence[Image.Image], sample: Sample, names: Sequence[str], dark: bool = False
) -> Figure:
    """The pictures, and below each how many of its tokens enter each layer.

    Args:
        images, names: of the prompt's pictures, in their order.
        sample: the prompt's record, `trace.samples[i]`.

    Raises:
        ImportError: matplotlib is missing.
        ValueError: the prompt has another number of pictures.
    """
    if not len(images) == len(names) == len(sample.pictures):
        raise ValueError(
            f"the prompt has {len(sample.pictures)} pictures, got {len(images)} images and {len(names)} names"
        )
    layers = range(len(sample.tokens_per_layer))
    kept = [sample.kept_by_picture(layer) for layer in layers]
    columns = min(_COLUMNS, len(images))
    rows = -(-len(images) // columns)
    figure = new_figure(3.2 * columns, 3.4 * rows + 0.4, dark)
    figure.suptitle(CAPTION, color=theme(dark).ink, fontsize=9)
    panels = figure.subplots(2 * rows, columns, squeeze=False)
    for axes in panels.flat:
        axes.set_axis_off()
    for number, (image, name) in enumerate(zip(images, names, strict=True)):
        row, column = divmod(number, columns)
        shown, bars = panels[2 * row][column], panels[2 * row + 1][column]
        counts = [layer[number] for layer in kept]
        shown.imshow(image.resize((320, max(round(320 * image.height / image.width), 1))))
        mean = sum(counts) / len(counts)
        title = f"{name}: {mean:.4g} of {sample.pictures[number]} per layer"
        shown.set_title(title, color=theme(dark).ink, fontsize=9)
        bars.set_axis_on()
        bars.bar(layers, counts, width=0.8, color=COLOURS[0])
        bars.set_ylim(0, max(sample.pictures))
        if row + 1 == rows:
            bars.set_xlabel("decoder layer")
        style_axes(bars, dark)
    return figure
