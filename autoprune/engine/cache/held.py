"""Layers of a cache that hold pruned prompts: what is remembered of these goes where their rows go.

A layer's class is replaced by one that derives from it, for as long as the layer holds them. So whoever moves
rows, resets, copies or stores a cache does it by the layers' own methods, and nothing has to be watched.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, wraps
from typing import TYPE_CHECKING, Any

import torch
import transformers
from packaging.version import Version

from ...errors import UnsupportedError
from .rows import MOVES, Rows

if TYPE_CHECKING:
    from .pruned import PrunedCache

HOLDING = "_autoprune"
VALID = "_autoprune_valid"
PADDING = "_autoprune_padding"
DROPPED = "_autoprune_dropped"
BUFFERS = "_autoprune_held"

# Until then, a positive number said how many columns a crop leaves.
CROPS_TO_LENGTH = Version(transformers.__version__) < Version("5.18")


@dataclass(eq=False)
class Holding:
    """What one layer of a cache holds of pruned prompts.

    pruned: what all layers have in common.
    rows, stage: the tokens are those of this stage, in rows that are moved as the layer's.
    expected: whether the next tokens come with a mask and positions for them.
    """

    pruned: PrunedCache
    rows: Rows
    stage: int
    expected: bool = False

    @property
    def column(self) -> torch.Tensor:
        """LongTensor [batch, n], the column of the prompt that each token came from; -1 for padding."""
        return self.rows.column(self.stage)

    @property
    def width(self) -> int:
        return self.rows.widths[self.stage]

    @property
    def renumbered(self) -> bool:
        """Whether compacted positions are others than the model's own."""
        return self.pruned.renumbered[self.stage]


@cache
def _held_class(base: type) -> type:
    """The class of layers of class `base` while they hold pruned prompts."""

    class Held(base):
        # The class behind it is known to transformers by its type, if it has one.
        _layer_type = None

        def update(self, key_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            held = getattr(self, HOLDING)
            if held.expected:
                held.expected = False
            else:
                _refuse_without_hooks(held.pruned, key_states.shape[-2])
            return super().update(key_states, *args, **kwargs)

        def get_seq_length(self) -> Any:
            """That of the whole prompt where layer 0 was cut: positions of new tokens are counted from it."""
            length, dropped = super().get_seq_length(), getattr(self, DROPPED, None)
            return length if dropped is None else length + dropped

        def crop(self, tokens_to_remove: int) -> None:
            if tokens_to_remove > 0 and CROPS_TO_LENGTH and not self.is_sliding:
                # The layer has fewer tokens than the conversation has columns.
                held = getattr(self, HOLDING)
                columns = held.pruned.prompt_length - held.width + super().get_seq_length()
                tokens_to_remove = min(tokens_to_remove - columns, 0)
            super().crop(tokens_to_remove)

        def reset(self) -> None:
            release(self)
            self.reset()

        def __reduce__(self) -> tuple:
            return _blank, (base,), self.__dict__

    Held.__name__ = Held.__qualname__ = f"Pruned{base.__name__}"
    for name in MOVES:
        if move := getattr(base, name, None):
            setattr(Held, name, _followed(name, move))
    return Held


def _blank(base: type) -> Any:
    held = _held_class(base)
    return held.__new__(held)


def _refuse_without_hooks(pruned: PrunedCache, new: int) -> None:
    if reason := pruned.reason_for_hooks(new):
        raise UnsupportedError(
            f"this cache was pruned, and {reason}; go on in the context that pruned it, or before its handle "
            "is detached"
        )


def _followed(name: str, move: Callable) -> Callable:
    @wraps(move)
    def moved(layer: Any, argument: Any) -> None:
        move(layer, argument)
        held = getattr(layer, HOLDING)
        held.rows = held.rows.moved(name, argument)
        if not held.pruned.has_like_rows:
            for buffer in (VALID, PADDING):
                if (rows := getattr(layer, buffer, None)) is not None:
                    put(layer, buffer, MOVES[name](rows, argument))

    return moved


def hold(layer: Any, pruned: PrunedCache, rows: Rows, stage: int) -> None:
    """Let a layer remember what it holds, until it is reset."""
    layer.__class__ = _held_class(type(layer))
    setattr(layer, HOLDING, Holding(pruned, rows, stage))


def holding(layer: Any) -> Holding | None:
    return getattr(layer, HOLDING, None)


def release(layer: Any) -> None:
    """Let a layer forget; harmless if it holds nothing."""
    if holding(layer) is not None:
        layer.__class__ = type(layer).__bases__[0]
    for name in (HOLDING, VALID, PADDING, DROPPED):
        layer.__dict__.pop(name, None)


def put(layer: Any, name: str, value: torch.Tensor) -> None:
    """Set a tensor of a layer, at the address it had for earlier prompts.

    Compiled decoding reads it there, and would otherwise be compiled or recorded again.
    """
    buffers = layer.__dict__.setdefault(BUFFERS, {})
    old = buffers.get(name)
    if old is None or old.shape != value.shape or old.device != value.device:
        torch._dynamo.mark_static_address(value)
        buffers[name] = value
    else:
        old.copy_(value)
    setattr(layer, name, buffers[name])
