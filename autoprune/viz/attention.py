"""Where a question settles: the attention of the text on the picture, over depth."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .depth import check_layers, check_tokens, show_picture, sized, some
from .style import COLOURS, add_legend, matplotlib_parts, new_figure, style_axes, theme
from .views import View

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_INCHES, _PIXELS = 2.0, 240
_SHADES = "cividis"  # even for colour-blind readers


def attention_over_depth(
    attention: ArrayLike,
    views: Sequence[View] = (),
    layers: Sequence[int] | None = None,
    dark: bool = False,
) -> Figure:
    """Figure 1 of the AutoPrune paper for a picture of one's own: where the question settles.

    Above, the attention at several depths, each map scaled to its own largest value, in shades that follow the
    root. Below, over all layers,
    the share of the text's attention that the picture gets, and the share of the visual tokens that hold half
    of it: few where the question has found its place.

    Args:
        attention: float [L, N], of the text on each visual token, as `Looked.attention`: of the unpruned model.
        views: what the decoder sees; without them there are no maps.
        layers: depths of the maps; default: layer 1, the middle and the last one.
        dark: light lines on dark paper.

    Raises:
        ImportError: matplotlib is missing.
        ValueError: the attention is not of that shape, there is no such layer, or the views hold other tokens.
    """
    values = np.asarray(attention, dtype=np.float64)
    if values.ndim != 2 or not values.size:
        raise ValueError(
            f"attention must be [layers, visual tokens], got the shape {values.shape}; pass Looked.attention"
        )
    chosen = check_layers(layers, len(values))
    if not views:
        figure = new_figure(7.2, 3.4, dark)
        _lines(figure.subplots(), values, dark)
        return figure
    check_tokens(views, values.shape[1])
    shown = some(views)
    heights = [view.image.height / view.image.width * _INCHES for view in shown]
    figure = new_figure(max(_INCHES * len(chosen) + 0.6, 6.4), sum(heights) + 3.2, dark)
    parts: Any = figure.subfigures(2, 1, height_ratios=[sum(heights) + 0.5, 2.7])
    maps, lines = parts
    for part in (maps, lines):
        part.set_facecolor(theme(dark).paper)
    cells = maps.subplots(len(shown), len(chosen), squeeze=False, height_ratios=heights)
    for view, row in zip(shown, cells, strict=True):
        for axes, layer in zip(row, chosen, strict=True):
            _map(axes, view, values[layer])
    for axes, layer in zip(cells[-1], chosen, strict=True):
        axes.set_xlabel(f"layer {layer}", color=theme(dark).ink, fontsize=9)
    _lines(lines.subplots(), values, dark)
    return figure


def half_of_attention(attention: ArrayLike) -> NDArray[np.float64]:
    """The smallest share of the visual tokens that holds half of the picture's attention, [L].

    Args:
        attention: float [L, N].
    """
    values = -np.sort(-np.asarray(attention, dtype=np.float64), axis=1)
    held = values.cumsum(axis=1)
    # The first token with which half is reached; equality counts.
    reached = held >= held[:, -1:] / 2 * (1 - 1e-9)
    share: NDArray[np.float64] = (reached.argmax(axis=1) + 1) / values.shape[1]
    return share


def _map(axes: Any, view: View, values: NDArray[np.float64]) -> None:
    picture = sized(view.image.convert("L"), _PIXELS)
    show_picture(axes, picture)
    shade = np.sqrt(values / max(values.max(), 1e-12))
    heat = view.of_tokens(shade, np.nan).astype(np.float64)
    extent = (-0.5, picture.width - 0.5, picture.height - 0.5, -0.5)
    # What gets little attention lets the picture through.
    opacity = np.nan_to_num(0.3 + 0.6 * heat)
    axes.imshow(
        heat, cmap=_SHADES, vmin=0, vmax=1, alpha=opacity, extent=extent, interpolation="nearest"
    )


def _lines(axes: Any, values: NDArray[np.float64], dark: bool) -> None:
    _, formatter = matplotlib_parts()
    layers = range(len(values))
    lines = (
        (values.sum(axis=1), "attention of the text that the picture gets", COLOURS[0], "o"),
        (half_of_attention(values), "visual tokens that hold half of it", COLOURS[1], "s"),
    )
    for shares, name, colour, marker in lines:
        axes.plot(layers, shares, color=colour, marker=marker, markersize=4, label=name)
    axes.set_ylim(0, None)
    axes.yaxis.set_major_formatter(formatter(lambda value, _: f"{value:.0%}"))
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel("decoder layer (nothing pruned)")
    style_axes(axes, dark)
    add_legend(axes, dark, fontsize=9)
