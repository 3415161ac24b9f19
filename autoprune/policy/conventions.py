"""What papers mean by "64 tokens", as the mean number of visual tokens that enter a decoder layer.

Five things are called the number of tokens: the mean over layers of what ENTERS them, which is what FLOPs
and the KV cache see; the mean of what LEAVES them; what is left after the last cut; what enters the first
layer; and the mean over stages, be they long or short. `readings` gives all five of a schedule. A
convention is how one paper states its settings:

    fastv      what is left after the cut before layer 2: all N enter the layers before
    pdrop      mean over the four stages that cuts before layers 8, 16 and 24 make, each a fixed share lambda
               of the one before
    sparsevlm  mean of what leaves a layer, merged tokens included, of its published lists
    visionzip  what enters the decoder, for every method that cuts before it
    entering   the mean that `Budget.tokens` takes

Settings are stated for N = 576 and 32 layers; cuts are rescaled to other depths, lists to other N. The
mean of what leaves is no schedule by itself: see `entering_from_leaving`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from .released import cluster_count, recycled_count
from .schedules import at_depth, check_size

FASTV_LAYER = 2
PDROP_LAYERS = (8, 16, 24)
SPARSEVLM_LAYERS = (3, 7, 16)
"""The layers that SparseVLM's cuts after layers 2, 6 and 15 come before."""

SPARSEVLM_LISTS = {64: (66, 30, 17), 128: (303, 110, 36), 192: (300, 200, 110)}
"""What is kept at each cut, merged tokens not counted."""

SPARSEVLM_TOKENS = 576

Schedule = list[float]


@dataclass(frozen=True)
class Readings:
    """What one schedule may be said to have, in visual tokens."""

    entering: float
    leaving: float
    after_last_cut: float
    first_layer: float
    mean_of_stages: float


def readings(schedule: Sequence[float]) -> Readings:
    """The five readings of a schedule n_0..n_{L-1} of tokens entering each layer.

    A stage is a run of layers that the same number enters. Nothing is cut after the last layer.
    """
    layers, last = len(schedule), schedule[-1]
    stages = [schedule[0], *(b for a, b in pairwise(schedule) if b != a)]
    entering = sum(schedule) / layers
    leaving = entering_to_leaving(entering, last, schedule[0], layers)
    return Readings(entering, leaving, last, schedule[0], sum(stages) / len(stages))


def entering_from_leaving(leaving: float, last: float, num_visual: float, num_layers: int) -> float:
    """Mean of tokens entering a layer, from the mean leaving it: `leaving + (N - n_{L-1}) / L`.

    Args:
        last: n_{L-1}, tokens that enter the last layer; all of them leave it.
    """
    return leaving + (num_visual - last) / num_layers


def entering_to_leaving(entering: float, last: float, num_visual: float, num_layers: int) -> float:
    """The other way round: `entering - (N - n_{L-1}) / L`."""
    return entering - (num_visual - last) / num_layers


def published_schedule(
    convention: str, stated: float, num_visual: int = 576, num_layers: int = 32
) -> Schedule:
    """Tokens entering each layer at a setting of a paper, `[L]`; fractions of tokens are kept.

    Args:
        convention: one of `CONVENTIONS`.
        stated: the number of tokens as that paper states it.

    Raises:
        ValueError: no such convention, or a number that it cannot state.
    """
    check_size(num_layers, num_visual)
    shape = _shape(convention)
    _check_stated(stated, num_visual)
    return shape(float(stated), num_visual, num_layers)


def to_entering(
    convention: str, stated: float, num_visual: int = 576, num_layers: int = 32
) -> float:
    """The mean of tokens entering a layer that a paper's number of tokens costs; as `published_schedule`."""
    schedule = published_schedule(convention, stated, num_visual, num_layers)
    return sum(schedule) / num_layers


def from_entering(
    convention: str, entering: float, num_visual: int = 576, num_layers: int = 32
) -> float:
    """What a paper would state for a mean of tokens entering a layer: the inverse of `to_entering`.

    Raises:
        ValueError: no such convention, or a mean below what its full layers cost alone.
    """
    check_size(num_layers, num_visual)
    shape = _shape(convention)
    _check_stated(entering, num_visual)

    def price(stated: float) -> float:
        return sum(shape(stated, num_visual, num_layers)) / num_layers

    low, high = _LEAST[convention] * num_visual, float(num_visual)
    if price(low) > entering * (1 + 1e-12):
        raise ValueError(
            f"no setting of {convention} enters {entering:g} tokens on average: its layers before the cuts "
            f"cost {price(low):g} alone; ask for at least that, or use --convention visionzip, which has none"
        )
    for _ in range(200):  # the price rises with what is stated
        middle = (low + high) / 2
        low, high = (middle, high) if price(middle) <= entering else (low, middle)
    return high if price(high) <= entering else low


def _fastv(stated: float, num_visual: int, num_layers: int) -> Schedule:
    full = at_depth(FASTV_LAYER, num_layers)
    return [float(num_visual)] * full + [stated] * (num_layers - full)


def _pdrop(stated: float, num_visual: int, num_layers: int) -> Schedule:
    if stated < num_visual / 4:
        raise ValueError(
            f"pdrop cannot state {stated:g} tokens: the first of its four stages holds all {num_visual}, a "
            f"quarter of which is {num_visual / 4:g}; comparisons at fewer tokens cut before layers 2, 6 and "
            "15 and state what enters, so use --convention entering"
        )
    low, high = 0.0, 1.0
    for _ in range(200):
        share = (low + high) / 2
        mean = num_visual * (1 + share + share**2 + share**3) / 4
        low, high = (share, high) if mean <= stated else (low, share)
    levels = [num_visual * low**stage for stage in (1, 2, 3)]
    return _steps(num_visual, num_layers, PDROP_LAYERS, levels)


def _sparsevlm(stated: float, num_visual: int, num_layers: int) -> Schedule:
    """A published list, or the mixture of the two that the number lies between."""
    numbers = [0, *SPARSEVLM_LISTS, SPARSEVLM_TOKENS]
    number = stated * SPARSEVLM_TOKENS / num_visual
    upper = next(i for i, listed in enumerate(numbers) if listed >= number and i)
    below, above = numbers[upper - 1], numbers[upper]
    part = (number - below) / (above - below)
    levels = [
        ((1 - part) * one + part * other) * num_visual / SPARSEVLM_TOKENS
        for one, other in zip(_with_merged(below), _with_merged(above), strict=True)
    ]
    return _steps(num_visual, num_layers, SPARSEVLM_LAYERS, levels)


def _with_merged(listed: int) -> list[int]:
    """What leaves each cut of a list: the kept tokens, and the means that the dropped are merged into."""
    if listed not in SPARSEVLM_LISTS:
        return [listed] * 3
    present, leaving = SPARSEVLM_TOKENS, []
    for kept in SPARSEVLM_LISTS[listed]:
        present = kept + cluster_count(recycled_count(present - kept))
        leaving.append(present)
    return leaving


def _flat(stated: float, num_visual: int, num_layers: int) -> Schedule:
    return [stated] * num_layers


def _steps(
    num_visual: int, num_layers: int, layers: Sequence[int], levels: Sequence[float]
) -> Schedule:
    """All tokens up to the first of `layers`, stated for 32, and a level from each of them on."""
    schedule = [float(num_visual)] * num_layers
    for layer, level in zip(layers, levels, strict=True):
        first = at_depth(layer, num_layers)
        schedule[first:] = [level] * len(schedule[first:])
    return schedule


_SHAPES: dict[str, Callable[[float, int, int], Schedule]] = {
    "fastv": _fastv,
    "pdrop": _pdrop,
    "sparsevlm": _sparsevlm,
    "visionzip": _flat,
    "entering": _flat,
}
_LEAST = {"fastv": 0.0, "pdrop": 0.25, "sparsevlm": 0.0, "visionzip": 0.0, "entering": 0.0}
"""The smallest number a convention can state, as a share of N."""

CONVENTIONS = (*_SHAPES, "leaving")
"""What `autoprune plan --convention` takes."""


def _shape(convention: str) -> Callable[[float, int, int], Schedule]:
    if convention == "leaving":
        raise ValueError(
            "a mean of tokens leaving a layer is no schedule by itself; use "
            "Budget.tokens(..., counted='leaving'), or entering_from_leaving with the last layer's count"
        )
    try:
        return _SHAPES[convention]
    except (KeyError, TypeError):
        known = ", ".join(CONVENTIONS)
        raise ValueError(f"unknown convention {convention!r}; choose one of: {known}") from None


def _check_stated(stated: Any, num_visual: int) -> None:
    number = isinstance(stated, (int, float)) and not isinstance(stated, bool)
    if not number or not math.isfinite(stated) or not 0 < stated <= num_visual:
        raise ValueError(
            f"a number of tokens must be above 0 and at most the prompt's {num_visual}, got {stated!r}"
        )
