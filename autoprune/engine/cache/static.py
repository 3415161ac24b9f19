"""Static caches: layers of a fixed size, whose count of tokens is a tensor on the device.

Compiled decoding reads tensors at the addresses where it found them first, and would otherwise be compiled or
recorded again. So what is known of a prompt is written into the tensors of the prompt before it (`Slots`).
"""

from __future__ import annotations

import numbers
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers.cache_utils import StaticCache, StaticLayer

from ...contract import MethodContract, ModelShape
from ...errors import UnsupportedError
from ...parts.transfer import to_device
from ..locate import Located
from ..tokens.layout import Layout
from ..tokens.present import Tokens
from .columns import MOVES, aligned, starts_of

# How finely room is planned over the lengths of text, where a budget pays for both.
TEXT_PIECES = 8
# More new tokens than there will ever be.
NEVER = torch.iinfo(torch.int32).max


def is_static(layer: Any) -> bool:
    """Whether a cache layer has a fixed size."""
    return hasattr(layer, "max_cache_len")


def narrowed(layer: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Layer arguments with the model's own mask cut to the length of a static layer.

    The model makes one mask, for the longest layer. A layer that was not cut holds column j in slot j.
    """
    mask = kwargs.get("attention_mask")
    if not is_static(layer) or not isinstance(mask, torch.Tensor) or mask.ndim != 4:
        return kwargs
    return {**kwargs, "attention_mask": mask[..., : layer.max_cache_len]}


@dataclass(eq=False)
class Slots:
    """What new tokens may see in the layers of a static cache, whose slots stand one layer behind the other.

    first_new: int32 [batch, all layers' slots]. The number of the first new token that sees the slot. New
        token 0 follows the prompt, so it is negative for the prompt's own tokens, and NEVER for padding.
    widths: LongTensor [L], tokens of the prompt in each layer, padding included.
    lengths: LongTensor [L, batch], the same without padding.
    dropped: LongTensor [], how many fewer layer 0 has than the prompt.
    starts, sizes: where each layer's slots begin, and how many it has.
    bias: float32, as `first_new`: what is added to the scores of attention on each (`Tokens.bias`); None for
        nothing.
    """

    first_new: torch.Tensor
    widths: torch.Tensor
    lengths: torch.Tensor
    dropped: torch.Tensor
    starts: list[int]
    sizes: list[int]
    bias: torch.Tensor | None = None

    @classmethod
    def of(
        cls, layers: Sequence[Any], held: Sequence[Tokens], length: int, before: Slots | None
    ) -> Slots:
        """Of a prompt of so many columns.

        Args:
            layers: the cache's.
            held: the tokens that each of them holds.
            before: of an earlier prompt, whose tensors are used again if they fit.
        """
        device, widths = held[0].column.device, [tokens.width for tokens in held]
        sizes = [layer.max_cache_len for layer in layers]
        pieces = zip(sizes, widths, strict=True)
        first_new = np.concatenate([np.arange(aligned(size)) - width for size, width in pieces])
        slots = cls(
            to_device(first_new.astype(np.int32), device).repeat(len(held[0].column), 1),
            to_device(widths, device),
            to_device([tokens.lengths for tokens in held], device),
            to_device(length - widths[0], device),
            starts_of([aligned(size) for size in sizes]),
            sizes,
        )
        for number, tokens in enumerate(held):
            if tokens.padded:
                part = slots.of_layer(slots.first_new, number)[:, : tokens.width]
                part.masked_fill_(tokens.column < 0, NEVER)
        slots._weigh(held, weighed_before=before is not None and before.bias is not None)
        for name in ("first_new", "widths", "lengths", "dropped", "bias"):
            if (value := getattr(slots, name)) is not None:
                setattr(slots, name, _in_place(value, getattr(before, name, None)))
        return slots

    def _weigh(self, held: Sequence[Tokens], weighed_before: bool) -> None:
        """Note what is added for the sizes of tokens. What a compiled step has added once, it adds always."""
        if not weighed_before and all(tokens.bias is None for tokens in held):
            return
        self.bias = torch.zeros(self.first_new.shape, device=self.first_new.device)
        for number, tokens in enumerate(held):
            if tokens.bias is not None:
                self.of_layer(self.bias, number)[:, : tokens.width] = tokens.bias

    def of_layer(self, values: torch.Tensor, number: int) -> torch.Tensor:
        """The slots of one layer, of values [..., all layers' slots]."""
        start = self.starts[number]
        return values[..., start : start + self.sizes[number]]

    def seen(self, new: torch.Tensor, number: int | None = None) -> torch.Tensor:
        """bool [batch, 1, queries, slots]: which slots the new tokens of these numbers [queries] may see.

        Args:
            number: of one layer; of all if it is None.
        """
        first_new = self.first_new if number is None else self.of_layer(self.first_new, number)
        return first_new[:, None, None] <= new[:, None]

    def show(self, number: int, shown: torch.Tensor, width: int) -> None:
        """Let one layer show those of its slots that are True in bool [batch, so many], and no other of these.

        Args:
            width: tokens of the prompt in the layer.
        """
        part = self.of_layer(self.first_new, number)[:, : shown.shape[1]]
        own = torch.arange(-width, shown.shape[1] - width, device=part.device, dtype=part.dtype)
        part.copy_(torch.where(shown, own, NEVER))

    def move(self, number: int, how: str, argument: Any) -> None:
        """Move the rows of one layer, as the method `how` of `MOVES` does."""
        moving = [self.of_layer(self.first_new, number), self.lengths[number]]
        if self.bias is not None:
            moving.append(self.of_layer(self.bias, number))
        for rows in moving:
            rows.copy_(MOVES[how](rows, argument))


def _in_place(value: torch.Tensor, old: torch.Tensor | None) -> torch.Tensor:
    """The value, at the address of an earlier one if that fits."""
    if old is not None and old.shape == value.shape and old.device == value.device:
        return old.copy_(value)
    torch._dynamo.mark_static_address(value)
    return value


class ShortLayer(StaticLayer):
    """A static layer with room for fewer tokens than the prompt has.

    The model makes one mask for all layers and asks a layer how wide; it is told of the whole prompt.
    """

    def __init__(self, max_cache_len: int, mask_length: int):
        super().__init__(max_cache_len=max_cache_len)
        self.mask_length = mask_length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.mask_length, 0

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if key_states.shape[-2] > self.max_cache_len:
            raise ValueError(
                f"a layer of this cache has room for {self.max_cache_len} tokens of a pruned prompt, "
                f"and is given {key_states.shape[-2]}; use it while the method that it was made for "
                "is attached, and reset it before"
            )
        return super().update(key_states, value_states, *args, **kwargs)


class PrunedStaticCache(StaticCache):
    """A static cache with a length of its own in every layer; see `Attachment.static_cache`.

    Layer l has room for `Method.capacity` of the largest prompt, its other tokens and the new ones.
    """

    def __init__(
        self,
        located: Located,
        method: MethodContract,
        shape: ModelShape,
        num_visual: int | Sequence[int],
        num_text: int,
        max_new_tokens: int,
    ):
        given = num_visual if isinstance(num_visual, Sequence) else [num_visual]
        sizes = _counts("num_visual", given, least=1)
        (self.num_text,) = _counts("num_text", [num_text], least=0)
        (new,) = _counts("max_new_tokens", [max_new_tokens], least=1)
        self.max_new_tokens = new
        if located.implementation not in ("sdpa", "eager"):
            raise UnsupportedError(
                f"{located.implementation!r} attention cannot decode on a static cache whose layers differ "
                "in length; use attn_implementation='sdpa'"
            )
        width = max(sizes) + self.num_text + new
        super().__init__(config=located.text.config, max_cache_len=width)
        plain = [layer for layer in self.layers if type(layer) is StaticLayer]
        if not len(plain) == len(self.layers) == shape.num_layers:
            raise UnsupportedError(
                "static caches of models with sliding (or linear) layers cannot be pruned; use the default "
                "cache"
            )
        self.method, self.shape = method, shape
        self.sizes, self.largest = {0, *sizes}, max(sizes)
        self.room = np.max([self._room_for(size) for size in self.sizes], axis=0)
        self.layers = [ShortLayer(room + new, width) for room in self.room.tolist()]

    def _room_for(self, num_visual: int) -> np.ndarray:
        """Tokens that a prompt with so many visual ones can have in each layer, [L]."""
        priced = self.method.budget.kind in ("flops", "kv_bytes")
        step = 1 + self.num_text // (TEXT_PIECES if priced else 1)
        room = np.zeros(self.shape.num_layers, dtype=np.int64)
        for least in range(0, self.num_text + 1, step):
            # Less text never means fewer visual tokens.
            counts = self.method.capacity(self.shape.num_layers, num_visual, least, self.shape.cost)
            # The last token of a prompt that ends with its picture is in every layer.
            visual = np.maximum(counts, min(num_visual, 1))
            most = min(least + step - 1, self.num_text)
            # Before the first cut the padding of the prompt is there, too.
            text = np.where(visual == num_visual, self.num_text, most)
            room = np.maximum(room, visual + text)
        return room

    def refuse_length(self, new: int) -> None:
        """Raise ValueError if so many new tokens are more than an empty cache was made for."""
        if new > self.max_new_tokens and not self.get_seq_length():
            raise ValueError(
                f"this static cache was made for max_new_tokens={self.max_new_tokens}, and {new} are "
                "to be generated; make one with more"
            )

    def admit(self, method: MethodContract, shape: ModelShape, layout: Layout) -> None:
        """Refuse prompts that do not fit, before anything of them is computed.

        Raises:
            ValueError: more visual or other tokens, another batch size or another method than the
                cache was made for, or a budget of bytes in another dtype.
        """
        if method is not self.method and method != self.method:
            raise ValueError(
                f"this static cache was made for {self.method}, but the model is pruned by {method}; "
                "make one with static_cache() of the attached handle"
            )
        made, size = self.shape.cost.dtype_bytes, shape.cost.dtype_bytes
        if method.budget.kind == "kv_bytes" and size != made:
            raise ValueError(
                f"this static cache was made for a model of {made} bytes per number, which by now has {size}: "
                "the budget pays for another number of tokens; make one with static_cache()"
            )
        batch, length = layout.real.shape
        first: Any = self.layers[0]
        if first.is_initialized and first.batch_size != batch:
            raise ValueError(
                f"this static cache holds a batch of {first.batch_size}, and is given one of {batch}; "
                "make a cache for each batch size"
            )
        text = max(*layout.num_text, length - max(layout.num_visual))
        if text > self.num_text:
            raise ValueError(
                f"this static cache was made for num_text={self.num_text}, and the prompt has {text} "
                "tokens that are not visual, padding included; make one with more"
            )
        for size in set(layout.num_visual) - self.sizes:
            if size > self.largest or (self._room_for(size) > self.room).any():
                raise ValueError(
                    f"a prompt with {size} visual tokens may not fit into this static cache, which was "
                    f"made for {sorted(self.sizes - {0})}; make one with static_cache(num_visual=[...]) "
                    "for all sizes that occur"
                )
            self.sizes.add(size)


def _counts(name: str, given: Sequence[Any], least: int) -> list[int]:
    if not given or any(not isinstance(n, numbers.Integral) or n < least for n in given):
        raise ValueError(f"{name} must be a whole number of tokens from {least} on, got {given}")
    return [int(n) for n in given]
