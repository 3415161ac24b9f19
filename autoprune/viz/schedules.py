"""Visual tokens over depth: schedules, the retention curve among others, and the flat schedule."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..trace import Sample
from .style import COLOURS, add_legend, matplotlib_parts, new_figure, style_axes, theme

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def plot_schedule(
    schedules: Sequence[Sequence[int]],
    labels: Sequence[str],
    budget: float | None = None,
    dark: bool = False,
) -> Figure:
    """Visual tokens entering each layer, one line per schedule, on a logarithmic scale.

    Args:
        schedules: n_0..n_{L-1} of each line.
        labels: one per schedule.
        budget: mean tokens per layer, drawn as a dotted line.
        dark: light lines on dark paper.

    Raises:
        ImportError: matplotlib is missing; it comes with `pip install autoprune[demo]`.
        ValueError: nothing to draw, or not one label per schedule.
    """
    if not schedules or len(schedules) != len(labels):
        raise ValueError(
            f"got {len(schedules)} schedules and {len(labels)} labels; give one label to each"
        )
    figure = new_figure(7.2, 4.2, dark)
    axes = figure.subplots()
    for index, (schedule, label) in enumerate(zip(schedules, labels, strict=True)):
        colour = COLOURS[index % len(COLOURS)]
        axes.step(
            range(len(schedule)), schedule, where="mid", color=colour, linewidth=2, label=label
        )
    if budget is not None:
        axes.axhline(
            budget, color="#868e96", linewidth=1, linestyle=":", label=f"budget {budget:g}"
        )
    _finish(axes, dark)
    return figure


def retention_curves(
    least: tuple[float, Sequence[int]],
    this: tuple[float, Sequence[int]],
    most: tuple[float, Sequence[int]],
    names: tuple[str, str] = ("least information", "most information"),
    dark: bool = False,
) -> Figure:
    """A prompt's schedule between those of the least and the most information of a reference set.

    All three spend the same budget. Little information is a hard prompt, whose tokens are kept early and
    narrowed late; much is an easy one, pruned hard from the first layers on.

    Args:
        least, this, most: mutual information in bits, and n_0..n_{L-1}.
        names: what the two ends are called.

    Raises:
        ImportError: matplotlib is missing.
        ValueError: the schedules are not of one depth.
    """
    depths = {len(counts) for _, counts in (least, this, most)}
    if len(depths) != 1:
        raise ValueError(
            f"the three schedules must be of one depth, got {sorted(depths)} layers; plan all of them for "
            "the same model"
        )
    figure = new_figure(7.2, 4.2, dark)
    axes = figure.subplots()
    layers = range(depths.pop())
    axes.fill_between(layers, least[1], most[1], step="mid", color=theme(dark).grid, linewidth=0)
    lines = (
        (least, names[0], COLOURS[0], "--", 1.6),
        (most, names[1], COLOURS[1], "-.", 1.6),
        (this, "this prompt", theme(dark).ink, "-", 2.4),
    )
    for (bits, counts), name, colour, dashes, width in lines:
        label = f"{name}: {bits:.3f} bits"
        axes.step(
            layers,
            counts,
            where="mid",
            color=colour,
            linestyle=dashes,
            linewidth=width,
            label=label,
        )
    _finish(axes, dark)
    return figure


def tokens_against_flat(sample: Sample, dark: bool = False) -> Figure:
    """Visual tokens entering each layer, against the flat schedule that spends the same.

    Raises:
        ImportError: matplotlib is missing.
        ValueError: the prompt has no picture.
    """
    if not sample.num_visual:
        raise ValueError("the prompt has no visual tokens, so there is no schedule to draw")
    counts = sample.tokens_per_layer
    figure = new_figure(7.2, 4.2, dark)
    axes = figure.subplots()
    layers = range(len(counts))
    axes.bar(layers, counts, width=0.8, color=COLOURS[0], label="entering this layer")
    mean = f"the same budget, flat: {sample.mean_tokens:.4g} in every layer"
    axes.step(
        layers,
        [sample.mean_tokens] * len(counts),
        where="mid",
        color=COLOURS[1],
        linewidth=2,
        linestyle="--",
        label=mean,
    )
    axes.set_xlim(-0.8, len(counts) - 0.2)
    # Areas compare what is spent, so the scale is linear.
    _finish(axes, dark, logarithmic=False)
    return figure


def _finish(axes: Any, dark: bool, logarithmic: bool = True) -> None:
    _, formatter = matplotlib_parts()
    if logarithmic:
        axes.set_yscale("log", base=2)
    axes.yaxis.set_major_formatter(formatter(lambda value, _: f"{value:g}"))
    axes.set_xlabel("decoder layer")
    axes.set_ylabel("visual tokens entering")
    axes.xaxis.get_major_locator().set_params(integer=True)
    style_axes(axes, dark)
    add_legend(axes, dark)
