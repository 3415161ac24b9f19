"""How many kernels a forward launches: what bounds a single prompt on a GPU, and can be counted anywhere."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ..parts import transfer

SORTS = {"sort", "topk", "argsort"}
SORT_LAUNCHES = 4
"""Kernels that a sort is on CUDA."""

# Neither computes anything: `_unsafe_view` is a view, and the others only reserve memory.
FREE = {
    "empty",
    "empty_like",
    "empty_strided",
    "new_empty",
    "_unsafe_view",
    "lift_fresh",
    "resize_",
    "detach_",
}


class Launches(TorchDispatchMode):
    """Counts the ATen operations that launch a kernel, by name, and the copies from the host.

    Views and empty tensors launch nothing. A copy is a call of `parts.transfer.to_device`; on a CPU it
    copies nothing, and is counted all the same. It is no launch.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()
        self.copies = 0
        self._copying = False

    def __enter__(self) -> Launches:
        self._to_device = transfer.to_device
        self._replace(self._to_device, self._counted_copy)
        super().__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        self._replace(self._counted_copy, self._to_device)

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        name = function._schema.name.removeprefix("aten::")
        if not (function.is_view or name in FREE or self._copying):
            self.seen[name] += 1
        return function(*args, **(kwargs or {}))

    @property
    def total(self) -> int:
        """Kernels on a GPU."""
        return kernels(self.seen)

    def _counted_copy(self, values: Any, device: torch.device) -> torch.Tensor:
        self.copies += 1
        self._copying = True
        try:
            return self._to_device(values, device)
        finally:
            self._copying = False

    @staticmethod
    def _replace(old: Any, new: Any) -> None:
        """In `transfer`, and in every module that imported the function from there."""
        for name, module in list(sys.modules.items()):
            if name.startswith("autoprune.") and vars(module).get("to_device") == old:
                module.to_device = new  # type: ignore[attr-defined]


def kernels(seen: Counter[str]) -> int:
    """Launches of so many operations of each name."""
    return sum(n * (SORT_LAUNCHES if name in SORTS else 1) for name, n in seen.items())


@contextmanager
def decoder_only(model: Any, launches: Launches) -> Iterator[Counter[str]]:
    """What the decoder itself launches while this lasts, hooks on it included."""
    before: list[Counter[str]] = []
    own: Counter[str] = Counter()
    text = model.get_decoder()

    def leave(*_: Any) -> None:
        own.update(launches.seen - before.pop())

    handles = [
        text.register_forward_pre_hook(lambda *_: before.append(launches.seen.copy())),
        text.register_forward_hook(leave, always_call=True),
    ]
    try:
        yield own
    finally:
        for handle in handles:
            handle.remove()
