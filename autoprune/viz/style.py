"""Colours, light and dark, and what every figure shares."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from PIL import Image

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito's palette, which colour-blind readers can tell apart, without its pale yellow and its black.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")

INK = (33, 37, 41)
FAINT = (108, 117, 125)
PAPER = (255, 255, 255)


@dataclass(frozen=True)
class Theme:
    """Colours of one appearance: paper, ink, faint ink and grid lines, each "#rrggbb"."""

    paper: str
    ink: str
    faint: str
    grid: str


LIGHT = Theme("#ffffff", "#212529", "#6c757d", "#e9ecef")
DARK = Theme("#161b22", "#e6edf3", "#9aa4ae", "#30363d")


def theme(dark: bool) -> Theme:
    return DARK if dark else LIGHT


def rgb(colour: str) -> tuple[int, int, int]:
    """The numbers of "#rrggbb"."""
    red, green, blue = (int(colour[start : start + 2], 16) for start in (1, 3, 5))
    return red, green, blue


def to_png(picture: Image.Image | Figure) -> bytes:
    """A picture of any function here, encoded."""
    buffer = io.BytesIO()
    if isinstance(picture, Image.Image):
        picture.save(buffer, format="PNG")
    else:
        picture.savefig(
            buffer, format="png", dpi=130, facecolor=picture.get_facecolor(), metadata=_NO_METADATA
        )
    return buffer.getvalue()


# The name and address of the library that drew it; a picture of the same figures is the same file.
_NO_METADATA = {"Software": None}


def matplotlib_parts() -> tuple[Any, Any]:
    """matplotlib's Figure and FuncFormatter.

    Raises:
        ImportError: matplotlib is missing; the message says how to install it.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import FuncFormatter
    except ImportError as error:
        raise ImportError(
            "plots need matplotlib, which is not installed: pip install 'autoprune[demo]'"
        ) from error
    return Figure, FuncFormatter


def new_figure(width: float, height: float, dark: bool) -> Figure:
    """An empty figure of so many inches, on the paper of its theme."""
    figure_class, _ = matplotlib_parts()
    figure: Figure = figure_class(
        figsize=(width, height), layout="constrained", facecolor=theme(dark).paper
    )
    return figure


def style_axes(axes: Any, dark: bool, grid: str = "y") -> None:
    """The theme's colours, no box around, and grid lines along one axis."""
    look = theme(dark)
    axes.set_facecolor(look.paper)
    axes.tick_params(colors=look.ink)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["bottom", "left"]].set_color(look.faint)
    axes.grid(axis=grid, color=look.grid)
    axes.set_axisbelow(True)
    for label in (axes.xaxis.label, axes.yaxis.label, axes.title):
        label.set_color(look.ink)


def add_legend(axes: Any, dark: bool, **options: Any) -> None:
    axes.legend(frameon=False, labelcolor=theme(dark).ink, **options)
