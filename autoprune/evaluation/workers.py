"""Settings shared out among processes; each setting has a file of its own, so none waits for another."""

from __future__ import annotations

import multiprocessing
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from .settings import Setting

Work = Callable[[Setting], Iterator[int]]
"""Does a setting's work, giving the number of questions answered whenever some are."""


def run_all(
    work: Work, settings: Sequence[Setting], workers: int, on_progress: Callable[[int], None]
) -> None:
    """Do the work of every setting.

    Args:
        workers: processes; 1 stays in this one. More are forked, so they share the model's weights
            and the inputs, and each computes with its part of the threads.

    Raises:
        RuntimeError: a worker failed; the message holds its stack trace.
    """
    if workers == 1:
        for setting in settings:
            for answered in work(setting):
                on_progress(answered)
        return
    context = multiprocessing.get_context("fork")
    messages: Any = context.SimpleQueue()
    next_one = context.Value("i", 0)
    arguments = (work, settings, next_one, messages, workers)
    processes = [
        context.Process(target=_serve, args=arguments, daemon=True) for _ in range(workers)
    ]
    for process in processes:
        process.start()
    try:
        _listen(messages, workers, on_progress)
    finally:
        for process in processes:
            process.terminate()
            process.join()


def check_workers(workers: int, device: torch.device) -> None:
    """Raise ValueError if so many workers cannot run a model of this device."""
    if workers < 1:
        raise ValueError(f"workers must be at least 1, got {workers}")
    if workers > 1 and (device.type != "cpu" or not sys.platform.startswith("linux")):
        raise ValueError(f"several workers need a model on the CPU and Linux, got {workers}; use 1")


@contextmanager
def threads_of_one(workers: int) -> Iterator[None]:
    """Compute with the threads that one of so many workers has."""
    before = torch.get_num_threads()
    torch.set_num_threads(max(1, before // workers))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _serve(
    work: Work, settings: Sequence[Setting], next_one: Any, messages: Any, workers: int
) -> None:
    """One worker: takes the next setting until there is none."""
    try:
        with threads_of_one(workers):
            while True:
                with next_one.get_lock():
                    index = next_one.value
                    next_one.value += 1
                if index >= len(settings):
                    break
                for answered in work(settings[index]):
                    messages.put(answered)
        messages.put(None)
    except KeyboardInterrupt:
        # The terminal interrupts every process; the first one says so.
        pass
    except BaseException:
        messages.put(traceback.format_exc())


def _listen(messages: Any, workers: int, on_progress: Callable[[int], None]) -> None:
    while workers:
        message = messages.get()
        if message is None:
            workers -= 1
        elif isinstance(message, int):
            on_progress(message)
        else:
            raise RuntimeError(f"a worker failed:\n{message}")
