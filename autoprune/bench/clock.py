"""Points in time, on a GPU without stopping it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch


class Clock:
    """Marks points in time and gives the seconds between them.

    On a GPU a mark is an event in its stream: nothing waits until the seconds are read. On a CPU with
    one thread it is the process's own time, which other programs on the machine disturb less than
    the time on the wall; with several threads the process's time is their sum, so the wall's is taken.

    Raises:
        ValueError: the device is neither a CPU nor a CUDA GPU.
    """

    def __init__(self, device: torch.device):
        if device.type not in ("cpu", "cuda"):
            raise ValueError(f"times are measured on cpu and cuda, not on {device.type!r}")
        self.device = device
        self.on_gpu = device.type == "cuda"
        self.name = "CUDA events" if self.on_gpu else "wall time"
        self._now = time.perf_counter
        if not self.on_gpu and torch.get_num_threads() == 1:
            self.name, self._now = "process time", time.process_time

    def mark(self) -> Any:
        if not self.on_gpu:
            return self._now()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def settle(self) -> None:
        """Wait until the device has done all that was asked of it."""
        if self.on_gpu:
            torch.cuda.synchronize(self.device)

    def seconds(self, marks: Sequence[Any]) -> list[float]:
        """Seconds between each mark and the next."""
        self.settle()
        pairs = pairwise(marks)
        if self.on_gpu:
            return [before.elapsed_time(after) / 1000 for before, after in pairs]
        return [after - before for before, after in pairs]
