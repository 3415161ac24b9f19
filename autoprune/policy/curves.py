"""Retention curves: the share of visual tokens a decoder layer deserves, as a function of depth.

Every curve takes the same two parameters, so that families can be exchanged under one policy: a
slope `k >= 0` (per layer) and a midpoint `x0` (an absolute layer index, fractions allowed) at which
retention is 1/2. With `u = k (l - x0)` for layer l:

    logistic     1 / (1 + exp(u))                    AutoPrune (NeurIPS 2025)
    linear       1/2 - u/4, clipped                  the logistic's tangent at the midpoint
    tanh         (1 - tanh(u)) / 2                   a logistic that falls twice as fast
    exponential  exp(-u/2) / 2, clipped              value and slope of the logistic at the midpoint
    step         1 / (1 + exp(sign(l - x0) k x0/2))  two levels, where the logistic is at x0/2
                                                     and its mirror image
    constant     1/2

All values lie in [FLOOR, 1], never increase with depth and are 1/2 everywhere for k = 0. Only the
ratios between layers matter to the budget solver, which scales the curve to spend the budget.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike, NDArray

Curve = Callable[[ArrayLike, ArrayLike, ArrayLike], NDArray[np.float64]]

FLOOR = 1e-6
"""Smallest retention: keeps every curve positive, as the budget solver needs."""

_MAX_EXPONENT = 700.0


def logistic(layers: ArrayLike, slope: ArrayLike, midpoint: ArrayLike) -> NDArray[np.float64]:
    """`1 / (1 + exp(k (l - x0)))`.

    Args:
        layers: absolute layer indices `[L]`.
        slope: k, per layer, at least 0; scalar or `[batch]`.
        midpoint: x0, in layers; scalar or `[batch]`.

    Returns:
        Retention `[batch, L]` (batch 1 for scalars), float64 in [FLOOR, 1].

    Raises:
        ValueError: shapes that do not fit, a negative slope, or a value that is not finite.
    """
    offset, _, _ = _prepare(layers, slope, midpoint)
    return _bounded(1.0 / (1.0 + _exp(offset)))


def linear(layers: ArrayLike, slope: ArrayLike, midpoint: ArrayLike) -> NDArray[np.float64]:
    """`1/2 - k (l - x0) / 4`, clipped; arguments and errors as for `logistic`."""
    offset, _, _ = _prepare(layers, slope, midpoint)
    return _bounded(0.5 - offset / 4.0)


def tanh(layers: ArrayLike, slope: ArrayLike, midpoint: ArrayLike) -> NDArray[np.float64]:
    """`(1 - tanh(k (l - x0))) / 2`; arguments and errors as for `logistic`."""
    offset, _, _ = _prepare(layers, slope, midpoint)
    return _bounded(0.5 * (1.0 - np.tanh(offset)))


def exponential(layers: ArrayLike, slope: ArrayLike, midpoint: ArrayLike) -> NDArray[np.float64]:
    """`exp(-k (l - x0) / 2) / 2`, clipped; arguments and errors as for `logistic`."""
    offset, _, _ = _prepare(layers, slope, midpoint)
    return _bounded(0.5 * _exp(-offset / 2.0))


def step(layers: ArrayLike, slope: ArrayLike, midpoint: ArrayLike) -> NDArray[np.float64]:
    """One cut at the midpoint: `1 / (1 + exp(sign(l - x0) k x0 / 2))`; arguments and errors as for
    `logistic`.
    """
    offset, slopes, midpoints = _prepare(layers, slope, midpoint)
    contrast = slopes * np.abs(midpoints) / 2.0
    return _bounded(1.0 / (1.0 + _exp(np.sign(offset) * contrast)))


def constant(layers: ArrayLike, slope: ArrayLike, midpoint: ArrayLike) -> NDArray[np.float64]:
    """1/2 at every layer, whatever the parameters; arguments and errors as for `logistic`."""
    offset, _, _ = _prepare(layers, slope, midpoint)
    return np.full_like(offset, 0.5)


def straight(num_layers: int) -> NDArray[np.float64]:
    """The straight line `1 - l / L` over all layers, `[L]`: it would reach 0 behind the last one.

    It has no parameters. It is not `linear`, which is clipped and so level in the early layers where
    its slope is that of AutoPrune.
    """
    return 1.0 - np.arange(num_layers) / num_layers


CURVES: dict[str, Curve] = {
    "logistic": logistic,
    "linear": linear,
    "tanh": tanh,
    "exponential": exponential,
    "step": step,
    "constant": constant,
}


def get_curve(name: str) -> Curve:
    """The curve of that name; a ValueError lists the known ones."""
    try:
        return CURVES[name]
    except (KeyError, TypeError):
        raise ValueError(f"unknown curve {name!r}; choose one of: {', '.join(CURVES)}") from None


def _prepare(
    layers: ArrayLike, slope: ArrayLike, midpoint: ArrayLike
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Checked `k (l - x0)` as `[batch, L]`, with k and x0 as `[batch, 1]` or `[1, 1]`."""
    depth = np.asarray(layers, dtype=np.float64)
    slopes = np.asarray(slope, dtype=np.float64)
    midpoints = np.asarray(midpoint, dtype=np.float64)
    if depth.ndim != 1 or slopes.ndim > 1 or midpoints.ndim > 1:
        raise ValueError(
            "layers must be [L], slope and midpoint scalars or [batch]; "
            f"got shapes {depth.shape}, {slopes.shape} and {midpoints.shape}"
        )
    if not (slopes.min(initial=np.inf) >= 0 and slopes.max(initial=0) < np.inf):
        raise ValueError(
            f"slope must be finite and at least 0, got {slope!r}; "
            "clamp it first, as in max(k0 - gamma * mi, 0)"
        )
    if not np.isfinite(midpoints).all():
        raise ValueError(f"midpoint must be finite, got {midpoint!r}")
    slopes = slopes.reshape(-1, 1)
    midpoints = midpoints.reshape(-1, 1)
    if slopes.shape != midpoints.shape and 1 not in (len(slopes), len(midpoints)):
        raise ValueError(
            f"slope and midpoint differ in batch size: {len(slopes)} and {len(midpoints)}"
        )
    return slopes * (depth - midpoints), slopes, midpoints


def _exp(exponent: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.exp(np.minimum(exponent, _MAX_EXPONENT))


def _bounded(retention: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.minimum(np.maximum(retention, FLOOR), 1.0)
