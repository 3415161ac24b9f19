"""Decoding on a shrunken cache: the masks and positions that follow from what each layer still holds."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.nn.attention.flex_attention import BlockMask

from ..errors import UnsupportedError
from ..transfer import to_device
from .cache import PrunedCache, Stage, is_static, static_step
from .masks import as_mask, decode_mask, shown_columns
from .tap import no_plans

if TYPE_CHECKING:
    from .locate import Located

# New tokens that a mask has room for when it is made.
ROOM = 128


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
        # A static cache counts on the device, and its layers need no count here.
        static = is_static(cache.layers[0])
        if not static and (cropped := pruned.prompt_length - cache.get_seq_length()) > 0:
            pruned.shorten(cropped)
        self.past = 0 if static else cache.get_seq_length() - pruned.prompt_length
        several = self.queries > 1
        valid = shown_columns(mask, batch) if several or pruned.has_gaps else None
        if several and valid is not None:
            valid = _so_far(valid, int(cache.get_seq_length()) + self.queries)
            pruned.has_gaps = pruned.has_gaps or pruned.hides(valid)
            if static and pruned.has_gaps:
                pruned.hide(cache, valid)
        self.valid = valid if pruned.has_gaps else None
        # Whether a new token sees all that is there, so that it needs no mask.
        self.sees_all = not several and pruned.sees_all(located.windows)
        self._made: dict[Any, Any] = {}

    def before_layer(self, index: int, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        stage = self.pruned.stage_of_layer[index]
        layer = self.cache.layers[index]
        if is_static(layer):
            return args, static_step(self.located, layer, args[0], kwargs)
        self._crop(layer, stage)
        if self.sees_all and kwargs.get("attention_mask") is None:
            return args, kwargs
        kwargs, window = dict(kwargs), self.located.windows[index]
        mask = kwargs.get("attention_mask")
        key = "mask", stage.first_layer, id(mask), window, self._key_length(layer, stage)
        if key not in self._made:
            self._made[key] = self._mask(mask, stage, layer, window)
        kwargs["attention_mask"] = self._made[key]
        if self.pruned.compacted and stage.tokens.renumbered:
            key = ("rotary", stage.first_layer)
            if key not in self._made:
                self._made[key] = self.located.text.rotary_emb(args[0], self._positions(stage))
            kwargs["position_embeddings"] = self._made[key]
        return args, kwargs

    def attend(self, attend, *args, **kwargs):
        """The attention of one decoder layer."""
        with no_plans:
            return attend(*args, **kwargs)

    def _crop(self, layer: Any, stage: Stage) -> None:
        """Drop rejected draft tokens that a cropped cache left behind in the shorter layers."""
        keys = getattr(layer, "keys", None)
        # A layer of a quantised cache keeps a flat, empty tensor in the place of its keys.
        if getattr(layer, "is_sliding", False) or keys is None or keys.ndim != 4:
            return
        length = stage.tokens.width + self.past
        if keys.shape[-2] > length:
            layer.keys, layer.values = keys[..., :length, :], layer.values[..., :length, :]

    def _key_length(self, layer: Any, stage: Stage) -> int:
        if getattr(layer, "is_sliding", False):
            return layer.keys.shape[-2] + self.queries
        return stage.tokens.width + self.past + self.queries

    def _mask(self, mask: Any, stage: Stage, layer: Any, window: int | None) -> Any:
        tokens = stage.tokens
        if not (tokens.padded or self.queries > 1 or window is not None or self.valid is not None):
            return None
        if mask is None and self.implementation == "eager":
            mask = layer.keys
        plain = "flash" not in self.implementation and not isinstance(mask, BlockMask)
        if plain and self.queries == 1 and window is None and self.valid is None:
            return self._row(mask, stage)
        first, device = self.pruned.prompt_length, tokens.column.device
        new = torch.arange(first, first + self.past + self.queries, device=device)
        column = torch.cat([tokens.column, new.expand(tokens.column.shape[0], -1)], dim=1)
        # A sliding layer has let its oldest tokens go.
        length = self._key_length(layer, stage)
        column = column[:, column.shape[1] - length :]
        if "flash" in self.implementation:
            return self._flash_mask(column, new[self.past :], window)
        return as_mask(decode_mask(column, new[self.past :], window, self.valid), mask)

    def _row(self, like: torch.Tensor | None, stage: Stage) -> torch.Tensor:
        """The mask of one new token, which sees all but padding: a view of one made for many steps."""
        key = stage.first_layer, torch.bool if like is None else like.dtype
        length, made = stage.tokens.width + self.past + 1, self.pruned.masks.get(key)
        if made is None or made.shape[-1] < length:
            real = stage.tokens.column >= 0
            new = real.new_ones(len(real), max(self.past, ROOM) + 1 + self.past)
            made = as_mask(torch.cat([real, new], dim=1)[:, None, None], like)
            self.pruned.masks[key] = made
        return made[..., :length]

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

    def _positions(self, stage: Stage) -> torch.Tensor:
        tokens = stage.tokens
        device = tokens.column.device
        start = to_device(tokens.lengths, device) + self.past
        return start[:, None] + torch.arange(self.queries, device=device)
