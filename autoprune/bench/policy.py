"""Time of AutoPrune's planning alone: curve and exact solver, without a model."""

from __future__ import annotations

import time
from statistics import median

import numpy as np

from ..budget import Budget
from ..methods.autoprune import AutoPrune
from ..solver import solve_schedule

LAYERS, VISUAL, BATCH = 32, 2880, 64
REPEATS = 200


def policy_seconds(prompts: int) -> float:
    """Median seconds to turn mutual informations into schedules, 32 layers and 2880 visual tokens.

    Includes what a prefill does once the information is known; the layers before are decided.
    """
    method = AutoPrune(Budget.ratio(1 / 9))
    information = np.linspace(0.0, 1.0, prompts).tolist()
    decided = np.repeat([method.plan(LAYERS, VISUAL, 0.0)[: method.mi_layer + 1]], prompts, axis=0)
    taken = []
    for _ in range(REPEATS):
        start = time.thread_time()
        curves = method.retention(LAYERS, information)
        solve_schedule(curves, [VISUAL] * prompts, method.budget, fixed=decided)
        taken.append(time.thread_time() - start)
    return median(taken)
