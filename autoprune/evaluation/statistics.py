"""Accuracies with their uncertainty: a bootstrap over questions, paired between settings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
RESAMPLES = 2000
FEWEST = 10
"""Questions of each kind below which there is no interval: resampling a few sees too little chance."""
_CHUNK = 250


@dataclass(frozen=True)
class Estimate:
    """A value and the bounds of its 95 % confidence interval; None where there is too little to tell."""

    value: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Accuracies:
    """Accuracies of all settings, measured and resampled.

    measured: for each kind, float [settings]. resampled: for each kind, float [resamples, settings];
    one resample draws the same questions for every setting. questions: of each kind.
    """

    measured: dict[str, Floats]
    resampled: dict[str, Floats]
    questions: dict[str, int]

    def kind(self, kind: str, setting: int) -> Estimate:
        """Accuracy on one kind."""
        return _estimate(
            self.measured[kind][setting], self.resampled[kind][:, setting], self.questions[kind]
        )

    def macro(self, setting: int) -> Estimate:
        """Mean over the kinds."""
        measured, resampled = self._macro()
        return _estimate(measured[setting], resampled[:, setting], self._fewest())

    def micro(self, setting: int) -> Estimate:
        """Share of all questions."""
        counts = np.array(list(self.questions.values()), float)
        weights = counts / counts.sum()
        value, drawn = (
            np.tensordot(weights, np.stack([by[kind][..., setting] for kind in self.questions]), 1)
            for by in (self.measured, self.resampled)
        )
        return _estimate(value, drawn, self._fewest())

    def relative(self, setting: int, reference: int) -> Estimate | None:
        """Macro accuracy over that of `reference` on the same questions; None if that is 0."""
        measured, resampled = self._macro()
        if measured[reference] == 0:
            return None
        base = resampled[:, reference]
        drawn = resampled[base > 0, setting] / base[base > 0]
        return _estimate(measured[setting] / measured[reference], drawn, self._fewest())

    def difference(self, setting: int, other: int) -> Estimate:
        """Macro accuracy less that of `other`, question by question the same draw."""
        measured, resampled = self._macro()
        return _estimate(
            measured[setting] - measured[other],
            resampled[:, setting] - resampled[:, other],
            self._fewest(),
        )

    def _fewest(self) -> int:
        return min(self.questions.values())

    def _macro(self) -> tuple[Floats, Floats]:
        kinds = self.questions
        return (
            np.mean([self.measured[kind] for kind in kinds], axis=0),
            np.mean([self.resampled[kind] for kind in kinds], axis=0),
        )


def bootstrap(
    correct: NDArray[np.bool_],
    kinds: Sequence[str],
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Accuracies:
    """Resample the questions of each kind with replacement, the same ones for all settings.

    The number of questions of each kind stays what it is. Intervals are percentiles; they say how
    far another draw of questions might move a figure, and nothing about another trained model.

    Args:
        correct: [settings, questions].
        kinds: the kind of each question.
        resamples: how many times.
    """
    rng = np.random.default_rng(seed)
    names = np.asarray(kinds)
    measured, resampled, questions = {}, {}, {}
    for kind in dict.fromkeys(kinds):
        hits = correct[:, names == kind].T.astype(np.float32)
        count = len(hits)
        draws = [
            rng.multinomial(count, np.full(count, 1 / count), size=min(_CHUNK, resamples - start))
            for start in range(0, resamples, _CHUNK)
        ]
        measured[kind] = hits.mean(axis=0, dtype=np.float64)
        # Counts and hits are whole numbers: float32 sums them exactly up to 16 million.
        resampled[kind] = np.concatenate(
            [(draw.astype(np.float32) @ hits).astype(np.float64) / count for draw in draws]
        )
        questions[kind] = count
    return Accuracies(measured, resampled, questions)


def _estimate(value: float | Floats, drawn: Floats, questions: int) -> Estimate:
    if questions < FEWEST:
        return Estimate(float(value), None, None)
    low, high = np.percentile(drawn, (2.5, 97.5))
    return Estimate(float(value), float(low), float(high))
