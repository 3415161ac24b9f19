"""Time of AutoPrune's planning alone: curve and exact solver, without a model."""

from __future__ import annotations

import time
from statistics import median

import numpy as np

from ..methods.autoprune import AutoPrune
from ..policy.budget import Budget
from ..policy.solver import solve_schedule

LAYERS, VISUAL, BATCH = 32, 2880, 64
DECIDED = 2
"""Layers up to `mi_layer`, by default."""
REPEATS, BLOCKS = 200, 5


def policy_seconds(prompts: int) -> float:
    """Seconds to turn mutual informations into schedules, 32 layers and 2880 visual tokens.

    Includes what a prefill does once the information is known; the layers before are decided. The least of
    the medians of a few blocks of runs: a block is over before what else the machine does is.
    """
    method = AutoPrune(Budget.ratio(1 / 9))
    information = np.linspace(0.0, 1.0, prompts).tolist()
    decided = np.repeat([method.plan(LAYERS, VISUAL, 0.0)[:DECIDED]], prompts, axis=0)

    def once() -> float:
        start = time.thread_time()
        curves = method.retention(LAYERS, information)
        solve_schedule(curves, [VISUAL] * prompts, method.budget, fixed=decided)
        return time.thread_time() - start

    return min(median(once() for _ in range(REPEATS)) for _ in range(BLOCKS))
