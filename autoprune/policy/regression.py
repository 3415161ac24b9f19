"""Logistic regression, of a chance on a few numbers."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def logistic_regression(design: Floats, target: Floats, ridge: float) -> Floats:
    """Coefficients of a logistic regression with a penalty on all but the constant, by Newton's method.

    Args:
        design: [rows, features], the first of them 1 throughout.
        target: [rows], from 0 to 1.
        ridge: weight of the squared coefficients against the sum of the log losses.

    Returns:
        [features].
    """
    penalty = np.diag([1e-6, *[ridge] * (design.shape[1] - 1)])
    weights = np.zeros(design.shape[1])
    for _ in range(100):
        chance = 1 / (1 + np.exp(-np.clip(design @ weights, -30, 30)))
        gradient = design.T @ (chance - target) + penalty @ weights
        curvature = (design * np.maximum(chance * (1 - chance), 1e-6)[:, None]).T @ design + penalty
        step = np.linalg.solve(curvature, gradient)
        # Answers that never change would send the constant to infinity.
        weights = weights - np.clip(step, -1, 1)
        weights[0] = np.clip(weights[0], -8, 8)
        if np.abs(step).max() < 1e-9:
            break
    return weights
