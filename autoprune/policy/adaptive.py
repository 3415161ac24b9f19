"""Steps of layers that share their retention: fewer cuts under the same budget."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Staircase:
    """Layers taken together.

    Args:
        alone: so many first layers are steps of their own; the last of them takes what rounding leaves over.
        every: layers of each later step; what remains at the end is a shorter one.
    """

    alone: int
    every: int

    def average(self, retained: Floats) -> Floats:
        """Each layer's retention `[batch, L]` as the mean over its step."""
        if self.every == 1:
            return retained
        starts, sizes = self._steps(retained.shape[1])
        return np.repeat(np.add.reduceat(retained, starts, axis=1) / sizes, sizes, axis=1)

    def level(self, counts: Ints) -> Ints:
        """Counts `[batch, L]` that never rise, without a cut inside a step.

        The solver rounds layers of equal retention one by one, so a step may be left with two levels. What is
        above the lower one goes to the layer before the staircase, and the sum stays. A row where it does
        not fit there is returned as it is.
        """
        starts, sizes = self._steps(counts.shape[1])
        level = np.repeat(np.minimum.reduceat(counts, starts, axis=1), sizes, axis=1)
        before = self.before(counts.shape[1])
        level[:, before] += (counts - level).sum(axis=1)
        fits = level[:, before] <= counts[:, before - 1]
        return np.where(fits[:, None], level, counts)

    def before(self, layers: int) -> int:
        """The layer that takes what rounding leaves over."""
        return min(self.alone, layers) - 1

    def most_left_over(self, layers: int) -> int:
        """Rounding leaves over less than a token for each layer of a step."""
        return int(self._steps(layers)[1].max()) - 1

    def _steps(self, layers: int) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
        """First layer and number of layers of each step."""
        starts = np.r_[: min(self.alone, layers), self.alone : layers : self.every]
        return starts, np.diff(starts, append=layers)
