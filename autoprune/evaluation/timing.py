"""Prefill time on some of the prompts, the settings taking turns."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch

from .settings import FULL, Setting
from .tasks import Task

PROMPTS = 8
BATCHES = 12


def timed_batches(tasks: Sequence[Task]) -> list[Sequence[Task]]:
    """Up to `BATCHES` times `PROMPTS` neighbours, none twice, spread evenly over all tasks."""
    count = min(BATCHES, len(tasks) // PROMPTS)
    rest = len(tasks) - count * PROMPTS
    starts = [i * PROMPTS + (2 * i + 1) * rest // (2 * count) for i in range(count)]
    return [tasks[start : start + PROMPTS] for start in starts] or [tasks]


def prefill_milliseconds(
    model: Any,
    batches: Sequence[Any],
    settings: Sequence[Setting],
    on_progress: Callable[[], None] = lambda: None,
) -> list[list[float]]:
    """Milliseconds per prompt until the first new token, vision tower included, [settings][batches].

    On each batch the settings run one after the other, so that what else the machine does meets them alike;
    all have run there once before the clock counts. With fewer than `BATCHES` batches each is timed several
    times, and its median counts. The reference is the plain model, without the library.

    Args:
        batches: model inputs.
        settings: those that can run.
        on_progress: called after each batch.
    """
    repeats = -(-BATCHES // len(batches))
    found: list[list[float]] = [[] for _ in settings]
    for inputs in batches:
        turns = [[_seconds(model, inputs, s) for s in settings] for _ in range(1 + repeats)]
        prompts = len(inputs["input_ids"])
        for own, taken in zip(found, zip(*turns[1:], strict=True), strict=True):
            own.append(1000 * statistics.median(taken) / prompts)
        on_progress()
    return found


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
