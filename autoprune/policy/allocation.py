"""Who of several prompts gets how much, from what each is predicted to lose at each cost.

A prompt's predicted loss falls with what is spent on it. A batch takes next what lowers the loss most for its
cost, until the sum is spent. A stream has a price instead: each prompt spends as long as that lowers its loss
by more than the price. On convex curves both find the smallest sum of losses, so curves are made convex first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .rounding import round_to_total

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class LossCurve:
    """What one prompt is predicted to lose, as a convex line through a few points.

    Args:
        least, most: that can be spent on the prompt.
        costs: ascending, from `least` to `most`, `[points]`.
        losses: at these costs, `[points]`.
    """

    least: int
    most: int
    costs: Floats
    losses: Floats

    @classmethod
    def of(cls, costs: Floats, losses: Floats, least: int, most: int) -> LossCurve:
        """The lower convex hull of a table `[candidates]` of ascending costs, between `least` and `most`.

        Between two candidates the loss is taken as a straight line, outside of them as that of the nearest.
        """
        inside = costs[(costs > least) & (costs < most)]
        nodes = np.unique(np.concatenate(([least], inside, [most])).astype(np.float64))
        heights = np.interp(nodes, costs, losses)
        found = cls(least, most, nodes, heights)
        if (np.diff(found.slopes) >= 0).all():
            return found
        hull: list[int] = []
        for point in range(len(nodes)):
            while len(hull) > 1 and not _turns_up(nodes, heights, hull[-2], hull[-1], point):
                hull.pop()
            hull.append(point)
        return cls(least, most, nodes[hull], heights[hull])

    @property
    def slopes(self) -> Floats:
        """Loss per unit of cost between the points, ascending, `[points - 1]`; below 0 where spending helps."""
        return np.diff(self.losses) / np.diff(self.costs)

    def price_at(self, cost: float) -> float:
        """How much loss one more unit saves at this cost; 0 where it saves none."""
        if len(self.costs) == 1:
            return 0.0
        segment = np.searchsorted(self.costs, cost, side="left") - 1
        return max(-float(self.slopes[np.clip(segment, 0, len(self.costs) - 2)]), 0.0)

    def cheapest(self, price: float, most: int, usual: int) -> int:
        """The cost of at most `most` at which loss + price x cost is smallest; of several the one nearest to
        `usual`, so that a stream of equal prompts gets equally much.
        """
        most = min(most, self.most)
        costs = np.append(self.costs[self.costs < most], (most, min(usual, most)))
        total = np.interp(costs, self.costs, self.losses) + price * costs
        rounding = 1e-9 * (np.ptp(self.losses) + price * most)
        best = costs[total <= total.min() + rounding]
        nearest = best[np.argmin(np.abs(best - usual))]
        return min(max(int(nearest), self.least), most)


def share_sum(curves: Sequence[LossCurve], total: int) -> Ints:
    """What each prompt of a batch may spend, `[prompts]`: the best gain for its cost first, in all `total`.

    Gains of one size are shared in proportion, so that equal prompts get equally much. The sum is exactly
    `total`, by largest remainders (ties to the earlier prompt), where costs are small enough to be exact in
    float64; above that it may be some units less, never more.

    Args:
        total: between the sums of the curves' first and of their last costs.
    """
    least = np.array([curve.least for curve in curves])
    most = np.array([curve.most for curve in curves])
    lengths = np.concatenate([np.diff(curve.costs) for curve in curves])
    slopes = np.concatenate([curve.slopes for curve in curves])
    owner = np.repeat(np.arange(len(curves)), [len(curve.costs) - 1 for curve in curves])
    rest = total - sum(least.tolist())
    if not len(slopes) or rest <= 0:
        return least
    order = np.argsort(slopes, kind="stable")
    spent = np.cumsum(lengths[order])
    last = slopes[order[min(int(np.searchsorted(spent, rest)), len(order) - 1)]]
    # Gains that differ by rounding alone are equal.
    at = np.abs(slopes - last) <= 1e-9 * abs(last)
    before = (slopes < last) & ~at
    part = min((rest - lengths[before].sum()) / lengths[at].sum(), 1.0)
    taken = np.bincount(owner, lengths * (before + part * at), minlength=len(curves))
    real: Floats = np.clip(least + taken, least, most).astype(np.float64)
    if total < 2**50:
        return round_to_total(real[None], np.array([total]))[0]
    shares = np.clip(np.floor(real).astype(np.int64), least, most)
    shares[np.argmax(shares - least)] -= max(sum(shares.tolist()) - total, 0)
    return shares


def _turns_up(x: Floats, y: Floats, first: int, middle: int, last: int) -> bool:
    """Whether the middle point lies below the line from the first to the last."""
    rise = (y[middle] - y[first]) * (x[last] - x[first])
    return bool(rise < (y[last] - y[first]) * (x[middle] - x[first]))
