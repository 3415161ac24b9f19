"""Come between a model and methods of its own, on the instance."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import nn

Around = Callable[[Callable], Callable]


class Cover:
    """Methods of a module that are wrapped until `remove`; those that a release does not have are passed over.

    Args:
        around: for each name, what makes the wrapper of the method that was there.
    """

    def __init__(self, module: nn.Module, around: Mapping[str, Around]):
        self.module = module
        self._own = {name: module.__dict__.get(name) for name in around if hasattr(module, name)}
        for name in self._own:
            setattr(module, name, around[name](getattr(module, name)))

    def remove(self) -> None:
        for name, own in self._own.items():
            if own is None:
                delattr(self.module, name)
            else:
                setattr(self.module, name, own)
        self._own = {}
