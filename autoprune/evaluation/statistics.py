"""Figures with their uncertainty: a bootstrap over questions, paired between settings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
RESAMPLES = 2000
FEWEST = 10
"""Questions of each kind, or batches, below which there is no interval: a few show too little chance."""
_CHUNK = 250


@dataclass(frozen=True)
class Estimate:
    """A value and the bounds of its 95 % confidence interval; None where there is too little to tell."""

    value: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Resampled:
    """One figure of every setting, measured and resampled.

    measured: float [settings]. resampled: float [resamples, settings]; one resample draws the same
    questions, or batches of them, for every setting. count: how many, of the rarest kind.
    """

    measured: Floats
    resampled: Floats
    count: int

    def estimate(self, setting: int) -> Estimate:
        """The figure itself."""
        return self._estimate(self.measured[setting], self.resampled[:, setting])

    def ratio(self, setting: int, reference: int) -> Estimate | None:
        """The figure over that of `reference`, draw by draw; None if that is 0."""
        if self.measured[reference] == 0:
            return None
        base = self.resampled[:, reference]
        drawn = self.resampled[base > 0, setting] / base[base > 0]
        return self._estimate(self.measured[setting] / self.measured[reference], drawn)

    def difference(self, setting: int, other: int) -> Estimate:
        """The figure less that of `other`, draw by draw."""
        return self._estimate(
            self.measured[setting] - self.measured[other],
            self.resampled[:, setting] - self.resampled[:, other],
        )

    def _estimate(self, value: float, drawn: Floats) -> Estimate:
        if self.count < FEWEST:
            return Estimate(float(value), None, None)
        low, high = np.percentile(drawn, (2.5, 97.5))
        return Estimate(float(value), float(low), float(high))


@dataclass(frozen=True)
class Means:
    """Means over the questions of each kind."""

    kinds: dict[str, Resampled]

    @cached_property
    def macro(self) -> Resampled:
        """Mean over the kinds, each weighing the same."""
        return self._weighted(np.full(len(self.kinds), 1 / len(self.kinds)))

    @cached_property
    def micro(self) -> Resampled:
        """Mean over all questions."""
        counts = np.array([own.count for own in self.kinds.values()], float)
        return self._weighted(counts / counts.sum())

    def _weighted(self, weights: Floats) -> Resampled:
        each = list(self.kinds.values())
        return Resampled(
            np.tensordot(weights, np.stack([own.measured for own in each]), 1),
            np.tensordot(weights, np.stack([own.resampled for own in each]), 1),
            min(own.count for own in each),
        )


def bootstrap(
    figures: Sequence[ArrayLike], kinds: Sequence[str], resamples: int = RESAMPLES, seed: int = 0
) -> list[Means]:
    """Resample the questions of each kind with replacement, the same ones for all figures and settings.

    The number of questions of each kind stays what it is. Intervals are percentiles; they say how
    far another draw of questions might move a figure, and nothing about another trained model.

    Args:
        figures: each [settings, questions], such as right (1) or wrong (0), or the FLOPs spent.
        kinds: the kind of each question.
        resamples: how many times.
    """
    rng = np.random.default_rng(seed)
    names = np.asarray(kinds)
    values = [np.asarray(figure, np.float64) for figure in figures]
    found: list[dict[str, Resampled]] = [{} for _ in values]
    for kind in dict.fromkeys(kinds):
        chosen = names == kind
        count = int(chosen.sum())
        draws = [
            rng.multinomial(count, np.full(count, 1 / count), size=min(_CHUNK, resamples - start))
            for start in range(0, resamples, _CHUNK)
        ]
        for own, figure in zip(found, values, strict=True):
            asked = figure[:, chosen]
            drawn = np.concatenate([draw.astype(np.float64) @ asked.T for draw in draws])
            own[kind] = Resampled(asked.mean(axis=1), drawn / count, count)
    return [Means(own) for own in found]


def bootstrap_median(values: Floats, resamples: int = RESAMPLES, seed: int = 0) -> Resampled:
    """The median of each setting's values, [settings, values]; the n-th ones belong together."""
    count = values.shape[1]
    draws = np.random.default_rng(seed).integers(count, size=(resamples, count))
    drawn = np.stack([np.median(own[draws], axis=1) for own in values], axis=1)
    return Resampled(np.median(values, axis=1), drawn, count)
