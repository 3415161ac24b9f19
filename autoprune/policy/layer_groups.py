"""Groups of layers that share one count of tokens: fewer cuts under the same budget."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class LayerGroups:
    """Which of the L layers are taken together.

    Args:
        alone: each of so many first layers is a group of its own; the last of them takes what rounding
            leaves over.
        size: layers of each later group. The last group has what remains.
    """

    alone: int
    size: int

    def average(self, retained: Floats) -> Floats:
        """Each layer's retention `[batch, L]` as the mean over its group."""
        if self.size == 1:
            return retained
        starts, sizes = self._groups(retained.shape[1])
        return np.repeat(np.add.reduceat(retained, starts, axis=1) / sizes, sizes, axis=1)

    def level(self, counts: Ints) -> Ints:
        """Counts `[batch, L]` that never rise, without a cut inside a group.

        The solver rounds layers of equal retention one by one, so a group may be left with two counts. What is
        above the lower one goes to the last layer that stands alone, and the sum stays. A row where it does
        not fit there is returned as it is.
        """
        starts, sizes = self._groups(counts.shape[1])
        level = np.repeat(np.minimum.reduceat(counts, starts, axis=1), sizes, axis=1)
        last = self.last_alone(counts.shape[1])
        level[:, last] += (counts - level).sum(axis=1)
        fits = level[:, last] <= counts[:, last - 1]
        return np.where(fits[:, None], level, counts)

    def last_alone(self, layers: int) -> int:
        """The layer that takes what rounding leaves over."""
        return min(self.alone, layers) - 1

    def most_left_over(self, layers: int) -> int:
        """Rounding leaves over less than a token for each layer of a group."""
        return int(self._groups(layers)[1].max()) - 1

    def _groups(self, layers: int) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
        """First layer and number of layers of each group."""
        starts = np.r_[: min(self.alone, layers), self.alone : layers : self.size]
        return starts, np.diff(starts, append=layers)
