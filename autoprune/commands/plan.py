"""`autoprune plan`: schedules without a model."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ..files import check_picture_path, write_whole
from ..methods.autoprune import AutoPrune
from ..policy.budget import Budget
from ..policy.conventions import from_entering, published_schedule, readings, to_entering
from .report import bar, can_draw, print_json

_MOST_LAYERS, _MOST_TOKENS = 10_000, 100_000_000
"""Beyond any model; more would only fill the memory."""
_BARS = 4
"""Characters below which bars tell nothing."""

_DIRECTION = (
    "Much information is an easy prompt: pruned hard early, then held. "
    "Little is a hard one: kept early, narrowed late."
)


@dataclass(frozen=True)
class Stated:
    """A number of tokens as a paper states it, see `autoprune.policy.conventions`."""

    convention: str
    tokens: float


@dataclass(frozen=True)
class PlanRequest:
    """What to plan; `information` holds one mutual information (bits) per schedule."""

    method: AutoPrune
    layers: int
    visual: int
    text: int
    information: Sequence[float]
    output: Path | None = None
    as_json: bool = False
    stated: Stated | None = None


def in_convention(convention: str | None, budget: Budget, visual: int, layers: int) -> Budget:
    """The budget that a number of tokens stands for when a paper states it.

    Raises:
        ValueError: no such convention, a share, or a number that it cannot state.
    """
    if convention is None:
        return budget
    if budget.kind != "tokens" or budget.over != "prompt":
        raise ValueError(
            f"--convention {convention} converts a number of tokens, got {budget}; write --budget 64"
        )
    if convention == "leaving":
        return Budget.tokens(budget.value, counted="leaving")
    return Budget.tokens(to_entering(convention, budget.value, visual, layers))


def parse_information(mi: float, others: str | None) -> list[float]:
    """Mutual informations in bits, the first being `mi`, the others from "0.1,0.5"; each once.

    Raises:
        ValueError: one of them is no number, negative or not finite.
    """
    try:
        values = [mi, *(float(part) for part in (others or "").split(",") if part.strip())]
    except ValueError:
        raise ValueError(
            f"--compare-mi expects numbers separated by commas, got {others!r}"
        ) from None
    for value in values:
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(
                f"mutual information must be finite and at least 0 bits, got {value:g}"
            )
    return list(dict.fromkeys(values))


def plan(request: PlanRequest, console: Console) -> None:
    """Print the schedules, and plot them if asked to.

    Raises:
        ValueError: numbers that do not fit; InfeasibleBudget names the smallest budget that works.
    """
    if request.layers < 1 or request.visual < 1 or request.text < 0:
        raise ValueError(
            "layers and visual tokens must be at least 1 and text tokens at least 0, got "
            f"{request.layers}, {request.visual} and {request.text}"
        )
    if request.layers > _MOST_LAYERS or max(request.visual, request.text) > _MOST_TOKENS:
        raise ValueError(
            f"a plan has at most {_MOST_LAYERS} layers and {_MOST_TOKENS} tokens of a kind, got "
            f"{request.layers}, {request.visual} and {request.text}"
        )
    if request.output is not None:
        check_picture_path(request.output)
    schedules = [
        request.method.plan(
            num_layers=request.layers,
            num_visual=request.visual,
            mutual_information=value,
            num_text=request.text,
        )
        for value in request.information
    ]
    if request.output is not None:
        _plot(request, schedules, request.output)
    if request.as_json:
        _print_json(request, schedules, console)
    else:
        _print_table(request, schedules, console)


def _plot(request: PlanRequest, schedules: list[list[int]], output: Path) -> None:
    from ..viz import plot_schedule, to_png

    labels = [_label(value, request.information) for value in request.information]
    mean = sum(schedules[0]) / request.layers
    write_whole(output, to_png(plot_schedule(schedules, labels, mean)))


def _label(value: float, information: Sequence[float]) -> str:
    """ "0.1 bits", with the hardest and the easiest of several prompts marked."""
    ends = {min(information): " (hardest)", max(information): " (easiest)"}
    return f"{value:g} bits" + (ends.get(value, "") if len(information) > 1 else "")


def _print_json(request: PlanRequest, schedules: list[list[int]], console: Console) -> None:
    record: dict[str, Any] = {
        "layers": request.layers,
        "visual_tokens": request.visual,
        "budget": str(request.method.budget),
        "curve": request.method.curve,
        "schedules": [
            {
                "mutual_information": value,
                "tokens_per_layer": counts,
                "mean_tokens": sum(counts) / len(counts),
            }
            for value, counts in zip(request.information, schedules, strict=True)
        ],
    }
    if request.stated is not None:
        record["convention"] = _converted(request, request.stated, schedules[0])
    print_json(console, record)


def _converted(request: PlanRequest, stated: Stated, planned: list[int]) -> dict[str, Any]:
    """The stated number in every reading, and what its convention would state for as many entering.

    A mean of tokens leaving a layer is read off AutoPrune's own schedule.
    """
    size = request.visual, request.layers
    if stated.convention == "leaving":
        schedule: Sequence[float] = planned
        same = dataclasses.replace(request.method, budget=Budget.tokens(stated.tokens))
        bits = request.information[0]
        back = _or_none(
            lambda: readings(same.plan(request.layers, request.visual, bits, request.text)).leaving
        )
    else:
        schedule = published_schedule(stated.convention, stated.tokens, *size)
        back = _or_none(lambda: from_entering(stated.convention, stated.tokens, *size))
    return {
        "name": stated.convention,
        "stated": stated.tokens,
        "readings": dataclasses.asdict(readings(schedule)),
        "stated_for_as_many_entering": back,
    }


def _or_none(convert: Callable[[], float]) -> float | None:
    """None where a convention cannot state so few tokens."""
    try:
        return convert()
    except ValueError:
        return None


def _print_converted(converted: dict[str, Any], console: Console) -> None:
    name, stated, found = converted["name"], converted["stated"], converted["readings"]
    others = ", ".join(
        f"{label.replace('_', ' ')} {value:.6g}"
        for label, value in found.items()
        if label != "entering"
    )
    console.print(
        f"{stated:g} tokens by the count of {name}: {found['entering']:.6g} enter a layer on average"
    )
    console.print(f"the same schedule by other counts: {others}")
    back = converted["stated_for_as_many_entering"]
    if back is None:
        console.print(f"{stated:g} entering: fewer than {name} can have")
    else:
        console.print(f"{stated:g} entering: {back:.6g} by the count of {name}")


def _print_table(request: PlanRequest, schedules: list[list[int]], console: Console) -> None:
    unicode, digits = can_draw(console), len(str(request.visual))
    # What is left of a line beside borders, the layer and each schedule's number.
    room = (console.width - len("│ layer │")) // len(schedules) - digits - 4
    width = min(room, 40 if len(schedules) == 1 else max(8, 48 // len(schedules)))
    table = Table()
    table.add_column("layer", justify="right")
    for value in request.information:
        between = " " if width >= _BARS else "\n"
        table.add_column(f"{value:g}{between}bits", no_wrap=True)
    for layer in range(request.layers):
        cells = [f"{s[layer]:>{digits}}" for s in schedules]
        if width >= _BARS:
            bars = (bar(s[layer], request.visual, width, unicode) for s in schedules)
            cells = [" ".join(pair) for pair in zip(cells, bars, strict=True)]
        table.add_row(str(layer), *cells)
    table.add_section()
    table.add_row("mean", *(f"{sum(s) / request.layers:.6g}" for s in schedules))
    table.add_row("sum", *(str(sum(s)) for s in schedules))
    if request.stated is not None:
        _print_converted(_converted(request, request.stated, schedules[0]), console)
    console.print(f"{request.method.budget}, {request.method.curve} curve")
    console.print(table)
    if len(request.information) > 1:
        console.print(_DIRECTION)
    if request.output is not None:
        console.print(f"plot: {request.output}")
