"""Pieces of work shared out among processes, such as the settings of a comparison."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing import connection
from multiprocessing.connection import Connection
from typing import Any

import torch

from ..errors import UnsupportedError

Work = Callable[[Any], Iterator[Any]]
"""Does a piece of the work, giving what is to be known of it whenever there is something."""
_MOST = 4


def run_all(
    work: Work, pieces: Sequence[Any], workers: int, on_progress: Callable[[Any], None]
) -> None:
    """Do every piece of the work.

    Args:
        on_progress: is called in this process with what the work gives, in no order.
        workers: processes; 1 stays in this one. More are forked, so they share the model's weights
            and the inputs, and each computes with its part of the threads.

    Raises:
        ValueError, OSError, UnsupportedError: as the work raised it.
        ChildProcessError: a worker was killed.
        RuntimeError: anything else went wrong in a worker; the message holds its stack trace.
    """
    if workers == 1:
        for piece in pieces:
            for news in work(piece):
                on_progress(news)
        return
    context = multiprocessing.get_context("fork")
    next_one = context.Value("i", 0)
    processes, ears = [], []
    try:
        for _ in range(workers):
            ear, mouth = context.Pipe(duplex=False)
            ears.append(ear)
            arguments = (work, pieces, next_one, mouth, tuple(ears), workers)
            process = context.Process(target=_serve, args=arguments, daemon=True)
            process.start()
            # Once it is the worker's alone, its end is heard.
            mouth.close()
            processes.append(process)
        _listen(ears, on_progress)
    finally:
        for process in processes:
            process.terminate()
            process.join()


def default_workers(device: torch.device) -> int:
    """A process per core on the CPU, up to `_MOST`: one model is too small to keep several busy."""
    if device.type != "cpu" or not hasattr(os, "sched_getaffinity"):
        return 1
    return min(len(os.sched_getaffinity(0)), _MOST)


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
    work: Work,
    pieces: Sequence[Any],
    next_one: Any,
    mouth: Connection,
    ears: Sequence[Connection],
    workers: int,
) -> None:
    """One worker: takes the next piece until there is none."""
    # If nobody else holds them, speaking fails once the parent is gone, and the worker ends.
    for ear in ears:
        ear.close()
    last: BaseException | None = None
    try:
        with threads_of_one(workers):
            while True:
                with next_one.get_lock():
                    index = next_one.value
                    next_one.value += 1
                if index >= len(pieces):
                    break
                for news in work(pieces[index]):
                    mouth.send(news)
    except KeyboardInterrupt:
        # The terminal interrupts every process; the first one says so.
        return
    except (ValueError, OSError, UnsupportedError) as error:
        last = _portable(error)
    except BaseException:
        last = RuntimeError(f"a worker failed:\n{traceback.format_exc()}")
    with suppress(BrokenPipeError):
        mouth.send(last)


def _portable(error: Exception) -> Exception:
    """The error, if it reaches another process as what it is."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"a worker failed: {error}")
    return error


def _listen(ears: list[Connection], on_progress: Callable[[Any], None]) -> None:
    """Until every worker has said that it is done."""
    while ears:
        for ear in connection.wait(ears):
            assert isinstance(ear, Connection)
            try:
                message = ear.recv()
            except EOFError:
                raise ChildProcessError(
                    "a worker was killed, perhaps for want of memory; what was answered is kept, and the "
                    "same call continues: give it fewer workers or a smaller batch size"
                ) from None
            if message is None:
                ears.remove(ear)
            elif isinstance(message, BaseException):
                raise message
            else:
                on_progress(message)
