"""Hook into a module and wrap its methods, on the instance, and leave no trace in copies of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

Around = Callable[[Callable], Callable]

# What copies and pickles ask an object for, on the instance.
REDUCES = "__reduce_ex__"


class ModulePatch:
    """Hooks of a module and methods that are wrapped, until `remove`.

    Methods that a release does not have are passed over. A copy or a pickle of the module is without all of
    it: a method that is wrapped on the instance would run the original's, and hooks belong to one model.

    Args:
        around: for each name, what makes the wrapper of the method that was there.
    """

    def __init__(self, module: nn.Module, around: Mapping[str, Around] | None = None):
        self.module = module
        self._own: dict[str, Any] = {}
        self._hooks: list[RemovableHandle] = []
        self.wrap({REDUCES: self._reducing} | dict(around or {}))

    def wrap(self, around: Mapping[str, Around]) -> None:
        """Wrap further methods; one that is wrapped stays as it is."""
        for name in around:
            if name not in self._own and hasattr(self.module, name):
                self._own[name] = self.module.__dict__.get(name)
                setattr(self.module, name, around[name](getattr(self.module, name)))

    def hook(self, handle: RemovableHandle) -> RemovableHandle:
        """Take care of a hook that was registered on the module."""
        self._hooks.append(handle)
        return handle

    def unhook(self, handle: RemovableHandle) -> None:
        """Take out one such hook."""
        handle.remove()
        self._hooks.remove(handle)

    def remove(self) -> None:
        for handle in self._hooks:
            handle.remove()
        for name, own in self._own.items():
            if own is None:
                delattr(self.module, name)
            else:
                setattr(self.module, name, own)
        self._own, self._hooks = {}, []

    def _reducing(self, reduce: Callable) -> Callable:
        @wraps(reduce)
        def plain(protocol: Any) -> tuple[Any, ...]:
            made, arguments, *rest = reduce(protocol)
            if rest:
                rest[0] = self._without(rest[0])
            return (made, arguments, *rest)

        return plain

    def _without(self, state: Any) -> Any:
        """A module's `__dict__` as it was before."""
        if not isinstance(state, dict):
            return state
        ours = {handle.id for handle in self._hooks}
        plain = {}
        for name, value in state.items():
            if name in self._own:
                if self._own[name] is not None:
                    plain[name] = self._own[name]
            elif name.startswith(("_forward_hooks", "_forward_pre_hooks")):
                plain[name] = type(value)((i, hook) for i, hook in value.items() if i not in ours)
            else:
                plain[name] = value
        return plain
