"""Decoding on a pruned cache: the masks and positions that follow from what each layer still holds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch.nn.attention.flex_attention import BlockMask
from torch.nn.functional import pad

from ..errors import UnsupportedError
from .attention.masks import as_mask, biased, decode_mask, shown_columns
from .attention.tap import no_plans
from .cache.pruned import MEMORY, LayerMemory, PrunedCache, refuse_moved_rows
from .cache.static import Slots, narrowed
from .locate import Located, Window
from .refusals import refuse_sizes


def _so_far(valid: torch.Tensor, columns: int) -> torch.Tensor:
    """A caller's mask of so many columns: one for a static cache may go on to its end."""
    if valid.shape[1] < columns:
        raise ValueError(
            f"attention_mask has {valid.shape[1]} columns, but the cache and the new tokens have {columns}; "
            "pass one for the whole conversation"
        )
    return valid[:, :columns]


def _dtype(mask: Any, layer: Any) -> torch.dtype:
    """Of a mask that is added to the scores: the model's own, or what attention makes of a bool mask."""
    given = isinstance(mask, torch.Tensor) and mask.is_floating_point()
    return mask.dtype if given else layer.keys.dtype


class Decode:
    """One forward of new tokens on a pruned cache.

    Args:
        shape: prompts, and new tokens of each.
        mask: the caller's, of all columns so far; None if there is none.
    """

    def __init__(
        self,
        located: Located,
        pruned: PrunedCache,
        cache: Any,
        shape: tuple[int, int],
        mask: Any,
    ):
        self.located, self.pruned, self.cache = located, pruned, cache
        self.implementation = located.implementation
        batch, self.queries = shape
        refuse_moved_rows(cache, batch)
        static = pruned.slots is not None
        if not static and (cropped := pruned.prompt_length - cache.get_seq_length()) > 0:
            pruned.shorten(cache, cropped)
        # New tokens so far. A static cache counts them on the device, and its masks need no count here.
        self.past = 0 if static else cache.get_seq_length() - pruned.prompt_length
        several = self.queries > 1
        # What a static cache was told of it before, it remembers.
        has_gaps = pruned.has_gaps and not static
        valid = shown_columns(mask, batch) if several or has_gaps else None
        if several and valid is not None:
            valid = _so_far(valid, int(cache.get_seq_length()) + self.queries)
            pruned.note_hidden(cache, valid)
        self.valid = valid if pruned.has_gaps else None
        columns = pruned.prompt_length + self.past + self.queries
        # Those that hide anything by now.
        self.windows = [
            window if window is not None and (static or window.binds(columns)) else None
            for window in located.windows
        ]
        # Whether a new token sees all that is there, so that it needs no mask.
        self.sees_all = not several and not static and pruned.sees_all(self.windows)
        self._made: dict[Any, Any] = {}
        # Keys of layers that others read, as these find them.
        self._read: dict[int, int] = {}

    @property
    def has_to_do(self) -> bool:
        """Whether the layers' hooks have anything to do. A new token that sees all needs nothing, if the model
        makes no mask by the length of some layer either, as it does for eager attention and for windows.
        """
        plain = self.implementation == "sdpa" or "flash" in self.implementation
        return not (self.sees_all and plain) or any(self.located.windows)

    def before_layer(
        self, index: int, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[tuple, dict[str, Any]] | None:
        """What fits the tokens that the layer holds; None if that is what it is given."""
        if self.located.attentions[index] is None:
            # Its state holds what it was given; new tokens come one behind the other.
            return None
        mask = kwargs.get("attention_mask")
        read, window = self.located.reads[index], self.windows[index]
        layer = self.cache.layers[index if read is None else read]
        memory: LayerMemory = getattr(layer, MEMORY)
        if read is None:
            memory.expected = True
        if self.sees_all:
            return None if mask is None else (args, {**kwargs, "attention_mask": None})
        if read is None:
            keys = self._read[index] = self._keys(layer, memory)
        else:
            memory = replace(memory, stage=self.pruned.readers[index])
            keys = self._read[read]
        if self.pruned.slots is not None:
            fitting = self._static_mask(mask, self.pruned.slots, memory.number, layer)
        else:
            fitting = self._once(
                ("mask", memory.stage, memory.held, id(mask), window, keys),
                lambda: self._mask(mask, memory, layer, window, keys),
            )
        kwargs = {**kwargs, "attention_mask": fitting}
        if memory.renumbered:
            kwargs["position_embeddings"] = self._once(
                ("rotary", memory.stage, memory.held),
                lambda: self.located.text.rotary_emb(args[0], self._positions(memory)),
            )
        return args, kwargs

    def attend(self, attend: Callable, *args: Any, **kwargs: Any) -> Any:
        """The attention of one decoder layer."""
        with no_plans:
            return attend(*args, **kwargs)

    def _once(self, key: Any, make: Callable[[], Any]) -> Any:
        """What layers that hold the same share."""
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    @cached_property
    def _new(self) -> torch.Tensor:
        """LongTensor [queries], the numbers of these new tokens: 0 for the one behind the prompt."""
        layer = self.cache.layers[0]
        memory: LayerMemory = getattr(layer, MEMORY)
        device = memory.held.columns.device
        if self.pruned.slots is None:
            return torch.arange(self.past, self.past + self.queries, device=device)
        first = (layer.cumulative_length.to(device) - memory.width)[None]
        return first if self.queries == 1 else first + torch.arange(self.queries, device=device)

    def _positions(self, memory: LayerMemory) -> torch.Tensor:
        """Compacted positions of the new tokens, [batch, queries]."""
        return memory.held.lengths(memory.stage)[:, None] + self._new

    def _static_mask(self, mask: Any, slots: Slots, number: int, layer: Any) -> Any:
        """For one new token, one mask is made for all layers, of which each gets its own slots."""
        dtype = _dtype(mask, layer)
        if self.queries > 1 or isinstance(mask, BlockMask):
            seen = slots.seen(self._new, number)
            if slots.bias is None:
                return as_mask(seen, mask)
            return biased(seen, slots.of_layer(slots.bias, number), dtype)
        whole = self._once(
            ("slots", dtype), lambda: biased(slots.seen(self._new), slots.bias, dtype)
        )
        return slots.of_layer(whole, number)

    def _keys(self, layer: Any, memory: LayerMemory) -> int:
        """Keys that the layer's attention will have; a sliding layer has let its oldest tokens go."""
        if getattr(layer, "is_sliding", False):
            return layer.keys.shape[-2] + self.queries
        return memory.width + self.past + self.queries

    def _mask(
        self, mask: Any, memory: LayerMemory, layer: Any, window: Window | None, keys: int
    ) -> Any:
        several = self.queries > 1 or window is not None or self.valid is not None
        if not (several or self.pruned.padded or self.pruned.weighed):
            return None
        plain = "flash" not in self.implementation and not isinstance(mask, BlockMask)
        if plain and not several:
            # Made once for many steps and all layers of a stage, not in each layer at each step.
            return memory.held.mask(memory.stage, self.past + 1, _dtype(mask, layer))
        if mask is None and self.implementation == "eager":
            mask = layer.keys
        first, held = self.pruned.prompt_length, memory.column
        new = torch.arange(first, first + self.past + self.queries, device=held.device)
        column = torch.cat([held, new.expand(len(held), -1)], dim=1)
        column = column[:, column.shape[1] - keys :]
        if "flash" in self.implementation:
            if self.pruned.weighed:
                refuse_sizes(self.implementation)
            return self._flash_mask(column, new[self.past :], window)
        seen = decode_mask(column, new[self.past :], window, self.valid, memory.held.first)
        bias = memory.held.bias_of_stage(memory.stage)
        if bias is None:
            return as_mask(seen, mask)
        # Those of new tokens are 0; a sliding layer has let its oldest tokens go.
        bias = pad(bias, (0, self.past + self.queries))[:, -seen.shape[-1] :]
        return biased(seen, bias, _dtype(mask, layer))

    def _flash_mask(
        self, column: torch.Tensor, new: torch.Tensor, window: Window | None
    ) -> torch.Tensor:
        """The 2-D mask of keys; one new token's sliding window is said by it, in positions."""
        real = column >= 0
        if self.valid is not None:
            real = real & self.valid.gather(1, column.clamp(min=0))
        if window is not None:
            if window.chunked:
                raise UnsupportedError(
                    f"flash attention cannot follow chunks of {window.size} positions once the conversation is "
                    "longer; use attn_implementation='sdpa'"
                )
            if self.queries > 1:
                raise UnsupportedError(
                    f"flash attention would count its sliding window of {window.size} in kept tokens, "
                    "not in positions, for several new tokens at once; "
                    "use attn_implementation='sdpa'"
                )
            real = real & (column > new[-1] - window.size)
        return real.long()


def compiled_step(
    located: Located, layer: Any, hidden: torch.Tensor, kwargs: dict[str, Any]
) -> dict[str, Any]:
    """Layer arguments for new tokens on a layer of a static cache, inside torch.compile.

    It reads nothing from the device, so that one graph serves all prompts.
    """
    memory = LayerMemory.of(layer)
    if memory is None:
        return narrowed(layer, kwargs)
    memory.expected = True
    slots, number = memory.pruned.slots, memory.number
    assert slots is not None
    new = torch.arange(hidden.shape[1], device=slots.widths.device)
    new = new + layer.cumulative_length.to(new.device) - slots.widths[number]
    seen, mask = slots.seen(new, number), kwargs.get("attention_mask")
    if slots.bias is None:
        mask = as_mask(seen, mask)
    else:
        mask = biased(seen, slots.of_layer(slots.bias, number), _dtype(mask, layer))
    kwargs = {**kwargs, "attention_mask": mask}
    if memory.renumbered:
        positions = slots.lengths[number][:, None] + new
        kwargs["position_embeddings"] = located.text.rotary_emb(hidden, positions)
    return kwargs
