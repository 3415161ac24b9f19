"""The processes that `accelerate launch` or `torchrun` started, each with its share of the questions."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

# Shares end at different times, and nobody knows how long they take.
_PATIENCE = timedelta(days=30)


@dataclass(frozen=True)
class Processes:
    """Which of how many processes this one is; `local` counts those of one machine."""

    rank: int = 0
    count: int = 1
    local: int = 0

    @classmethod
    def launched(cls) -> Processes:
        """As the launcher says in the environment; without one, a single process."""
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
        rank, count, local = (
            int(os.environ.get(name, default)) for name, default in zip(names, "010", strict=True)
        )
        return cls(rank, count, local) if count > 1 else cls()

    def device(self, asked: str) -> str:
        """The device of this process: with "auto" each takes a GPU of its own."""
        if asked != "auto" or self.count == 1 or not torch.cuda.is_available():
            return asked
        return f"cuda:{self.local % torch.cuda.device_count()}"

    def wait(self) -> None:
        """Until all processes have come here."""
        if self.count == 1:
            return
        if not dist.is_initialized():
            dist.init_process_group("gloo", timeout=_PATIENCE)
        dist.barrier()
