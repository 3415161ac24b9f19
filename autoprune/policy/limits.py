"""The bounds a schedule must respect, checked and brought into one form: a row per prompt, falling
with depth.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .rounding import normalised

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Limits:
    """One row per prompt: counts decided already, then the bounds of the layers that are still
    free.
    """

    visual: Ints
    text: Ints
    fixed: Ints
    floors: Ints
    caps: Ints

    @property
    def layers(self) -> int:
        return int(self.fixed.shape[1] + self.floors.shape[1])

    @property
    def cheapest(self) -> Ints:
        return np.concatenate((self.fixed, self.floors), axis=1)

    def reopened(self) -> Limits:
        """The same layers with nothing decided yet, the early ones at the floor of the later."""
        done = self.fixed.shape[1]
        least = self.cheapest[:, min(done, self.layers - 1)][:, None]
        floors = np.concatenate((np.repeat(least, done, axis=1), self.floors), axis=1)
        caps = np.broadcast_to(self.visual[:, None], floors.shape)
        return Limits(self.visual, self.text, self.fixed[:, :0], floors, caps)


def rows(weights: ArrayLike, num_visual: ArrayLike) -> tuple[Ints, NDArray[np.float64]]:
    """N `[batch]` and the normalised curve `[batch, L]`, contiguous so that sums do not depend on
    memory layout.
    """
    visual = np.atleast_1d(np.asarray(num_visual, dtype=np.int64))
    curve = np.atleast_2d(np.ascontiguousarray(weights, dtype=np.float64))
    if (
        visual.ndim != 1
        or curve.ndim != 2
        or curve.shape[1] == 0
        or len(curve) not in (1, len(visual))
    ):
        raise ValueError(
            "weights must be [batch, L] and num_visual [batch] of the same batch size, "
            f"got shapes {list(np.shape(weights))} and {list(np.shape(num_visual))}"
        )
    if not (curve.min(initial=np.inf) > 0 and curve.max(initial=0.0) < np.inf):
        raise ValueError(
            "weights must be positive and finite; give every layer a small positive retention"
        )
    if len(curve) != len(visual):
        curve = np.repeat(curve, len(visual), axis=0)
    return visual, normalised(curve)


def bounds(
    visual: Ints,
    layers: int,
    num_text: ArrayLike,
    fixed: ArrayLike | None,
    floors: ArrayLike,
    caps: ArrayLike | None,
) -> Limits:
    batch = len(visual)
    text = np.zeros(batch, dtype=np.int64) + np.asarray(num_text, dtype=np.int64)
    if min(visual.min(initial=0), text.min(initial=0)) < 0:
        raise ValueError(
            "num_visual and num_text must not be negative, "
            f"got {visual.tolist()} and {text.tolist()}"
        )
    decided = (
        np.zeros((batch, 0), dtype=np.int64)
        if fixed is None
        else np.array(fixed, dtype=np.int64, ndmin=2)
    )
    done = decided.shape[1]
    if decided.shape[0] != batch or done > layers or text.shape != (batch,):
        raise ValueError(
            f"fixed must be [{batch}, at most {layers}] and num_text scalar or [{batch}], "
            f"got shapes {list(decided.shape)} and {list(np.shape(num_text))}"
        )
    last = visual[:, None]
    if done:
        falling = np.concatenate((last, decided), axis=1)
        if decided.min(initial=0) < 0 or (falling[:, 1:] > falling[:, :-1]).any():
            raise ValueError(
                "fixed must start at or below num_visual and never increase, "
                f"got {decided.tolist()} for num_visual {visual.tolist()}"
            )
        last = decided[:, -1:]
    upper = np.repeat(last, layers - done, axis=1)
    if caps is not None:
        bound = _per_layer(caps, batch, layers, "caps")[:, done:]
        upper = np.minimum(np.minimum.accumulate(bound, axis=1), last)
    elif isinstance(floors, int) and floors >= 0:
        # One floor for all layers falls nowhere, and no cap is below it.
        return Limits(visual, text, decided, np.minimum(upper, floors), upper)
    lower = np.minimum(_per_layer(floors, batch, layers, "floors")[:, done:], last)
    lower = np.maximum.accumulate(lower[:, ::-1], axis=1)[:, ::-1]
    if (lower > upper).any():
        raise ValueError(
            "floors exceed caps: some layer must keep more tokens than it, or a layer before it, "
            "may have; lower floors or raise caps"
        )
    return Limits(visual, text, decided, lower, upper)


def _per_layer(values: ArrayLike, batch: int, layers: int, name: str) -> Ints:
    array = np.asarray(values, dtype=np.int64)
    if array.shape not in ((), (layers,), (1, layers), (batch, layers)):
        raise ValueError(
            f"{name} must be a scalar, [{layers}] or [{batch}, {layers}], "
            f"got shape {list(array.shape)}"
        )
    if array.size and array.min() < 0:
        raise ValueError(f"{name} must not be negative, got {array.min()}")
    return np.broadcast_to(array, (batch, layers))
