"""The contexts that are open on models."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch import nn

from .compiled import CompiledLayers
from .forwards import Forwards
from .hooks import Hooks

# By decoder. One lock for all models: contexts open and close seldom.
_lock = threading.RLock()
_hooked: dict[nn.Module, Hooks] = {}


@dataclass(eq=False)
class Context:
    """One method at work on a model.

    thread: that opened it.
    for_all: whether it serves every thread that opened none of its own; if not, it does so only as long as
        no other is open.
    """

    forwards: Forwards
    thread: threading.Thread
    for_all: bool
    is_open: bool = False

    def open(self) -> None:
        """Install the hooks, or share those of the contexts that are open.

        Raises:
            UnsupportedError: this thread has an open one already.
        """
        text = self.forwards.located.text
        with _lock:
            hooks = _hooked.get(text) or Hooks(self.forwards.located)
            hooks.refuse_another(self)
            try:
                hooks.add(self)
            except BaseException:
                hooks.discard(self)
                raise
            _hooked[text] = hooks

    def close(self) -> None:
        """Take the hooks out, unless others need them; harmless if it is not open."""
        text = self.forwards.located.text
        with _lock:
            if self.is_open:
                hooks = _hooked[text]
                hooks.discard(self)
                if not hooks.contexts:
                    del _hooked[text]

    def compile(self, layers: CompiledLayers) -> None:
        """Run the layers of this context's prefills compiled, from now on."""
        with _lock:
            if self.is_open:
                _hooked[self.forwards.located.text].take_over_layers()
            self.forwards.compiled = layers

    @contextmanager
    def serving(self) -> Iterator[None]:
        """In this, the thread is served by this context."""
        with _hooked[self.forwards.located.text].bound(self):
            yield


def close_all(model: nn.Module) -> None:
    """Close every context that is open on `model`, or on a part of it that holds the decoder."""
    with _lock:
        for module in model.modules():
            if (hooks := _hooked.get(module)) is not None:
                for context in hooks.contexts:
                    context.close()
