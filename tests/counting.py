"""Operations that a piece of code hands to the device; views of a tensor are none."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator

from torch.utils._python_dispatch import TorchDispatchMode


class _Launches(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.counter: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if not function.is_view and function.name() != "aten::_unsafe_view":
            self.counter[function.name()] += 1
        return function(*args, **(kwargs or {}))


@contextlib.contextmanager
def launches() -> Iterator[Counter[str]]:
    """How often each ATen operation runs that computes something."""
    with _Launches() as mode:
        yield mode.counter
