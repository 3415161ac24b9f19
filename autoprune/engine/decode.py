"""Decoding on a shrunken cache: the masks and positions that follow from what each layer still holds."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.nn.attention.flex_attention import BlockMask

from ..errors import UnsupportedError
from .attention.masks import as_mask, decode_mask, shown_columns
from .attention.tap import no_plans
from .cache.held import HOLDING, Holding
from .cache.pruned import PrunedCache, is_static, static_step
from .refusals import refuse_moved_rows

if TYPE_CHECKING:
    from .locate import Located


def _so_far(valid: torch.Tensor, columns: int) -> torch.Tensor:
    """A caller's mask of so many columns: one for a static cache may go on to its end."""
    if valid.shape[1] < columns:
        raise ValueError(
            f"attention_mask has {valid.shape[1]} columns, but the cache and the new tokens have {columns}; "
            "pass one for the whole conversation"
        )
    return valid[:, :columns]


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
        # A static cache counts on the device, and its layers need no count here.
        self.static = is_static(cache.layers[0])
        if not self.static and (cropped := pruned.prompt_length - cache.get_seq_length()) > 0:
            pruned.shorten(cache, cropped)
        self.past = 0 if self.static else cache.get_seq_length() - pruned.prompt_length
        several = self.queries > 1
        valid = shown_columns(mask, batch) if several or pruned.has_gaps else None
        if several and valid is not None:
            valid = _so_far(valid, int(cache.get_seq_length()) + self.queries)
            pruned.has_gaps = pruned.has_gaps or pruned.hides(cache, valid)
            if self.static and pruned.has_gaps:
                pruned.hide(cache, valid)
        self.valid = valid if pruned.has_gaps else None
        # Whether a new token sees all that is there, so that it needs no mask.
        self.sees_all = not several and not self.static and pruned.sees_all(located.windows)
        self._made: dict[Any, Any] = {}

    def before_layer(self, index: int, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        """What fits the tokens that the layer holds; None if that is what it is given."""
        mask = kwargs.get("attention_mask")
        if self.sees_all:
            return None if mask is None else (args, {**kwargs, "attention_mask": None})
        layer = self.cache.layers[index]
        if self.static:
            return args, static_step(self.located, layer, args[0], kwargs)
        held, window = getattr(layer, HOLDING), self.located.windows[index]
        held.expected = True
        key = "mask", held.stage, held.rows, id(mask), window, self._key_length(layer, held)
        if key not in self._made:
            self._made[key] = self._mask(mask, held, layer, window)
        kwargs = {**kwargs, "attention_mask": self._made[key]}
        if self.pruned.compacted and held.renumbered:
            key = "rotary", held.stage, held.rows
            if key not in self._made:
                self._made[key] = self.located.text.rotary_emb(args[0], self._positions(held))
            kwargs["position_embeddings"] = self._made[key]
        return args, kwargs

    def attend(self, attend, *args, **kwargs):
        """The attention of one decoder layer."""
        with no_plans:
            return attend(*args, **kwargs)

    def _key_length(self, layer: Any, held: Holding) -> int:
        if getattr(layer, "is_sliding", False):
            return layer.keys.shape[-2] + self.queries
        return held.width + self.past + self.queries

    def _mask(self, mask: Any, held: Holding, layer: Any, window: int | None) -> Any:
        several = self.queries > 1 or window is not None or self.valid is not None
        if not (several or self.pruned.padded):
            return None
        plain = "flash" not in self.implementation and not isinstance(mask, BlockMask)
        if plain and not several:
            # The same that the attention would make of a bool mask, in each layer and at each step.
            given = mask is not None and mask.is_floating_point()
            dtype = mask.dtype if given else layer.keys.dtype
            return held.rows.mask(held.stage, self.past + 1, dtype)
        if mask is None and self.implementation == "eager":
            mask = layer.keys
        first, batch = self.pruned.prompt_length, len(held.rows)
        new = torch.arange(first, first + self.past + self.queries, device=held.column.device)
        column = torch.cat([held.column, new.expand(batch, -1)], dim=1)
        # A sliding layer has let its oldest tokens go.
        length = self._key_length(layer, held)
        column = column[:, column.shape[1] - length :]
        if "flash" in self.implementation:
            return self._flash_mask(column, new[self.past :], window)
        return as_mask(decode_mask(column, new[self.past :], window, self.valid), mask)

    def _flash_mask(
        self, column: torch.Tensor, new: torch.Tensor, window: int | None
    ) -> torch.Tensor:
        """The 2-D mask of keys; one new token's sliding window is said by it, in positions."""
        real = column >= 0
        if self.valid is not None:
            real = real & self.valid.gather(1, column.clamp(min=0))
        if window is not None:
            if self.queries > 1 and self.pruned.prompt_length + self.past + self.queries > window:
                raise UnsupportedError(
                    f"flash attention would count its sliding window of {window} in kept tokens, "
                    "not in positions, for several new tokens at once; "
                    "use attn_implementation='sdpa'"
                )
            real = real & (column > new[-1] - window)
        return real.long()

    def _positions(self, held: Holding) -> torch.Tensor:
        new = torch.arange(self.past, self.past + self.queries, device=held.rows.columns.device)
        return held.rows.length(held.stage)[:, None] + new
