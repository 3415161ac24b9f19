"""Memory of a prefill: the peak of what it allocates, and what its cache really holds."""

from __future__ import annotations

import weakref
from contextlib import ExitStack
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class AllocationCounter(TorchDispatchMode):
    """Counts the bytes of tensors that operations make and have not let go of.

    Scratch memory inside a single operation is not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.held = 0
        self.peak = 0
        self._known: dict[int, Any] = {}

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        for finalizer in self._known.values():
            finalizer.detach()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        for storage in _storages((args, kwargs)):
            self._meet(storage, size=0)
        made = function(*args, **kwargs)
        for storage in _storages(made):
            self._meet(storage, size=storage.nbytes())
        return made

    def _meet(self, storage: torch.UntypedStorage, size: int) -> None:
        key = storage._cdata
        if key not in self._known:
            self.held += size
            self.peak = max(self.peak, self.held)
            self._known[key] = weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        del self._known[key]
        self.held -= size


class PeakMemory:
    """Highest number of bytes of tensors that were allocated since `start` and are held at a time.

    On a GPU it is the allocator's own figure, on a CPU an `AllocationCounter`'s. A context manager,
    so that an interrupted run stops counting too.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self._counter = None if device.type == "cuda" else AllocationCounter()
        self._running = ExitStack()

    def __enter__(self) -> PeakMemory:
        return self

    def __exit__(self, *exception: object) -> None:
        self._running.close()

    def start(self) -> None:
        if self._counter is not None:
            self._running.enter_context(self._counter)
        else:
            torch.cuda.reset_peak_memory_stats(self.device)
            self._before = torch.cuda.memory_allocated(self.device)

    def stop(self) -> int:
        self._running.close()
        if self._counter is not None:
            return self._counter.peak
        torch.cuda.synchronize(self.device)
        return torch.cuda.max_memory_allocated(self.device) - self._before


def cache_bytes(cache: Any) -> int:
    """Bytes of memory behind the keys and values of all layers of a cache."""
    return sum(
        tensor.untyped_storage().nbytes()
        for layer in cache.layers
        for tensor in (layer.keys, layer.values)
    )


def _storages(tree: Any) -> list[torch.UntypedStorage]:
    return [leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]
