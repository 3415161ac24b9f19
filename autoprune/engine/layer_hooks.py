"""The hooks before the decoder's layers, which come and go with the work there is for them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import nn

from .patch import ModulePatch

_lock = threading.RLock()


class LayerHooks:
    """The hooks before the decoder's layers, which are there only while a forward has work for them.

    A plain decoding step has none. They stay until a forward begins that does not need them, unless another
    thread does. Compiled decoding finds them as they were, as steps of a static cache always need them.
    """

    def __init__(self, layers: Sequence[nn.Module], hook: Callable):
        self._layers, self._hook = layers, hook
        self.patches: list[ModulePatch] = []
        self._handles: list[Any] = []
        self._running: set[threading.Thread] = set()
        self._stay = False

    def begin(self, needed: bool) -> None:
        """A forward of this thread begins."""
        if not needed and not self._handles:
            return
        with _lock:
            if needed:
                self._running.add(threading.current_thread())
                if not self._handles:
                    self._install()
            elif not (self._stay or self._running - {threading.current_thread()}):
                self.remove()

    def keep(self) -> None:
        """Have them there from now on."""
        self._stay = True
        if not self._handles:
            self._install()

    def end(self) -> None:
        """It is over."""
        if self._running:
            with _lock:
                self._running.discard(threading.current_thread())

    def _install(self) -> None:
        for index, (layer, patch) in enumerate(zip(self._layers, self.patches, strict=True)):
            # In front of others, which see what the layer gets.
            handle = layer.register_forward_pre_hook(
                partial(self._hook, index), with_kwargs=True, prepend=True
            )
            self._handles.append(patch.hook(handle))

    def remove(self) -> None:
        for handle, patch in zip(self._handles, self.patches, strict=False):
            patch.unhook(handle)
        self._handles = []
