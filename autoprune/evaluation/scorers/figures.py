"""The figures of a score, with their intervals."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from ..statistics import RESAMPLES, Estimate, Floats, Resampled
from .matching import Question


@dataclass(frozen=True)
class Figure:
    """One number of a score.

    value: in `unit`; None where it is not defined. low, high: its 95 % confidence interval; None where there
    are too few questions, or no bootstrap of it. questions: how many it is of.
    """

    name: str
    value: float | None
    low: float | None
    high: float | None
    questions: int
    unit: str = "%"


Score = tuple[list[Figure], list[str]]
"""The figures of a format, and what a reader has to know beside them."""


def resample(
    outcomes: ArrayLike, statistic: Callable[[Floats], Floats], seed: int = 0
) -> Resampled:
    """Figures that only depend on how often each outcome came.

    To draw N questions with replacement is to draw how often each outcome comes, so the bootstrap needs no
    more than that, however many questions there are.

    Args:
        outcomes: int [outcomes], how often each came; at least one came.
        statistic: the figures of each row of counts, [rows, outcomes] -> [rows, figures]; NaN where one is
            undefined.
        seed: figures that are added up later are drawn from different ones.
    """
    counts = np.asarray(outcomes, np.float64)
    total = int(counts.sum())
    drawn = np.random.default_rng(seed).multinomial(total, counts / total, size=RESAMPLES)
    with np.errstate(divide="ignore", invalid="ignore"):
        return Resampled(statistic(counts[None])[0], statistic(drawn.astype(float)), total)


def figure(name: str, estimate: Estimate, questions: int, unit: str = "%") -> Figure:
    """A figure from what was estimated; NaN is undefined."""
    if np.isnan(estimate.value):
        return Figure(name, None, None, None, questions, unit)
    bounds = (estimate.low, estimate.high)
    low, high = (None if bound is None or np.isnan(bound) else bound for bound in bounds)
    return Figure(name, estimate.value, low, high, questions, unit)


def mean(name: str, values: Sequence[float]) -> Figure:
    """The mean of the questions' scores between 0 and 1, in per cent."""
    # Rounding errors would make one score two outcomes.
    levels, counts = np.unique(np.round(values, 12), return_counts=True)
    found = resample(counts, lambda n: 100 * (n @ levels)[:, None] / n.sum(axis=1, keepdims=True))
    return figure(name, found.estimate(0), len(values))


def means(questions: Sequence[Question], values: Sequence[float]) -> list[Figure]:
    """The mean over all questions, and over those of each group in the order of their names."""
    found = [mean("accuracy", values)]
    for group in sorted({group for question in questions for group in question.groups}):
        inside = [v for q, v in zip(questions, values, strict=True) if group in q.groups]
        found.append(mean(f"accuracy, {group}", inside))
    return found
