"""Prefill time on a few prompts, the settings taking turns."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch

from .settings import FULL, Setting

PROMPTS = 8
REPEATS = 5


def prefill_milliseconds(model: Any, inputs: Any, settings: Sequence[Setting]) -> list[float]:
    """Median milliseconds per prompt until the first new token, vision tower included.

    All settings run once before the clock counts, then take turns, so that what else the machine does
    meets them alike. The reference is the plain model, without the library.

    Args:
        inputs: one batch.
        settings: those that can run.
    """
    times: list[list[float]] = [[] for _ in settings]
    for turn in range(REPEATS + 1):
        for setting, taken in zip(settings, times, strict=True):
            seconds = _seconds(model, inputs, setting)
            if turn:
                taken.append(seconds)
    prompts = len(inputs["input_ids"])
    return [1000 * statistics.median(taken) / prompts for taken in times]


@torch.inference_mode()
def _seconds(model: Any, inputs: Any, setting: Setting) -> float:
    plain = setting.label == FULL or setting.method is None
    with nullcontext() if plain else setting.method(model):  # type: ignore[misc]
        _wait(model)
        start = time.perf_counter()
        model.generate(**inputs, max_new_tokens=1, do_sample=False)
        _wait(model)
    return time.perf_counter() - start


def _wait(model: Any) -> None:
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
