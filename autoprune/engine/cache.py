"""Decoding on a shrunken cache: what each layer still holds, and the masks that follow from it."""

from __future__ import annotations

import types
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.attention.flex_attention import BlockMask

from ..errors import UnsupportedError
from ..transfer import to_device
from .masks import as_mask, decode_mask
from .tap import no_plans
from .tokens import Tokens

if TYPE_CHECKING:
    from .locate import Located
    from .prefill import Prefill

ATTRIBUTE = "_autoprune"
VALID = "_autoprune_valid"
PADDING = "_autoprune_padding"
DROPPED = "_autoprune_dropped"
DRAFTS = "_autoprune_drafts"
HELD = "_autoprune_held"
# New tokens that a mask has room for when it is made.
ROOM = 128


@dataclass(eq=False)
class Stage:
    """The tokens entering `first_layer` and the layers behind it up to the next cut."""

    first_layer: int
    tokens: Tokens

    def without_last(self, columns: int) -> Stage:
        """Without the prompt's last columns, which are text in every prompt."""
        return Stage(self.first_layer, self.tokens.without_last(columns))


@dataclass
class PrunedCache:
    """What was cut from a cache at prefill; it lives on the cache, so generations never share it.

    prompt_length: columns of the padded prompt; new tokens get the columns behind it.
    tail: of these columns, how many of the last are text in every prompt.
    stage_of_layer: for each layer, the tokens of the prompt that its cache holds.
    compacted: whether new tokens continue each layer's own compacted positions.
    padded: whether a layer's cache holds padding.
    has_gaps: whether a later turn hid tokens that came before it, or brought padding of its own.
    masks: of one new token, with room for those behind it, by stage and type.
    """

    prompt_length: int
    tail: int
    stage_of_layer: list[Stage]
    compacted: bool
    padded: bool
    has_gaps: bool = False
    masks: dict[Any, torch.Tensor] = field(default_factory=dict)

    @classmethod
    def remember(cls, prefill: Prefill) -> None:
        cache, depth = prefill.cache, len(prefill.located.layers)
        drafts, length = prefill.layout.drafts, prefill.layout.length
        kept = {stage: stage.without_last(drafts) for stage in prefill.stages}
        stages = [kept[prefill.stage_of(layer)] for layer in range(depth)]
        compacted = prefill.method.positions == "compacted"
        padded = any(stage.tokens.padded for stage in stages)
        tail = prefill.layout.tail
        setattr(cache, ATTRIBUTE, cls(length, tail, stages, compacted, padded))
        if is_static(cache.layers[0]):
            # Whether it holds anything is on the device, where nobody should have to ask.
            cache.reset = types.MethodType(_reset_cache, cache)
        for layer, stage in zip(cache.layers, stages, strict=False):
            if is_static(layer):
                _mark_valid(layer, stage.tokens, compacted and stage.tokens.renumbered)
        if stages[0].tokens.width < length:
            _report_length(cache.layers[0], length - stages[0].tokens.width)

    @classmethod
    def of(cls, cache: Any) -> PrunedCache | None:
        return getattr(cache, ATTRIBUTE, None)

    def sees_all(self, windows: Sequence[int | None]) -> bool:
        """Whether a new token sees all that is there at the model's own positions, and needs no mask."""
        special = self.padded or self.has_gaps or self.compacted or any(windows)
        return not special

    def shorten(self, columns: int) -> None:
        """Follow a cache that was cropped into its prompt, by so many of the last columns.

        Raises:
            UnsupportedError: not all of these are text in every prompt.
        """
        if columns > self.tail:
            raise UnsupportedError(
                f"the cache was cropped by {columns} columns of its pruned prompt, of which only the last "
                f"{self.tail} are text in every prompt; crop less, or run the prompt anew"
            )
        shorter = {stage: stage.without_last(columns) for stage in self.stage_of_layer}
        self.stage_of_layer = [shorter[stage] for stage in self.stage_of_layer]
        self.prompt_length, self.tail = self.prompt_length - columns, self.tail - columns
        self.masks.clear()

    def hides(self, valid: torch.Tensor) -> bool:
        """Whether the caller's mask, bool [batch, columns so far], hides any that is held or given."""
        column = self.stage_of_layer[0].tokens.column
        shown = valid.gather(1, column.clamp(min=0)) | (column < 0)
        return not bool(shown.all() & valid[:, self.prompt_length :].all())

    @staticmethod
    def forget(cache: Any) -> None:
        """Before a new prefill: a cache may be used again after a reset."""
        if cache is not None:
            for name in (ATTRIBUTE, DRAFTS, "reset"):
                cache.__dict__.pop(name, None)
            for layer in getattr(cache, "layers", ()):
                layer.__dict__.pop(VALID, None)
                layer.__dict__.pop(PADDING, None)


def _reset_cache(cache: Any) -> None:
    PrunedCache.forget(cache)
    cache.reset()


def is_static(layer: Any) -> bool:
    """Whether a cache layer has a fixed size (its count of tokens is then a tensor on the device)."""
    return hasattr(layer, "max_cache_len")


def _mark_valid(layer: Any, tokens: Tokens, compacted: bool) -> None:
    """Tell a static cache layer which of its slots hold real tokens; new tokens always are."""
    valid = torch.ones(tokens.column.shape[0], layer.max_cache_len, dtype=torch.bool)
    valid = valid.to(tokens.column.device)
    valid[:, : tokens.width] = tokens.column >= 0
    _put(layer, VALID, valid)
    if compacted:
        padding = [tokens.width - n for n in tokens.lengths]
        _put(layer, PADDING, to_device(padding, tokens.column.device))


def _hide(layer: Any, tokens: Tokens, valid: torch.Tensor, first: int) -> None:
    """Tell a static cache layer what the caller's mask hides, bool [batch, columns], of the prompt and
    of the tokens from column `first` on.
    """
    seen = getattr(layer, VALID).clone()
    seen[:, : tokens.width] = valid.gather(1, tokens.column.clamp(min=0)) & (tokens.column >= 0)
    seen[:, tokens.width : tokens.width + valid.shape[1] - first] = valid[:, first:]
    _put(layer, VALID, seen)


def _put(layer: Any, name: str, value: torch.Tensor) -> None:
    """Set a tensor of a layer, at the address it had for earlier prompts.

    Compiled decoding reads it there, and would otherwise be compiled or recorded again.
    """
    held = layer.__dict__.setdefault(HELD, {})
    old = held.get(name)
    if old is None or old.shape != value.shape or old.device != value.device:
        torch._dynamo.mark_static_address(value)
        held[name] = value
    else:
        old.copy_(value)
    setattr(layer, name, held[name])


def narrowed(layer: Any, kwargs: dict) -> dict:
    """Layer arguments with the model's own mask cut to the length of a static layer.

    The model makes one mask, for the longest layer. A layer that was not cut holds column j in slot j.
    """
    mask = kwargs.get("attention_mask")
    if not is_static(layer) or not isinstance(mask, torch.Tensor) or mask.ndim != 4:
        return kwargs
    return {**kwargs, "attention_mask": mask[..., : layer.max_cache_len]}


def static_step(located: Located, layer: Any, hidden: torch.Tensor, kwargs: dict) -> dict:
    """Layer arguments for new tokens on a layer of a static cache.

    Reads nothing from the device, so it can be compiled.
    """
    valid = getattr(layer, VALID, None)
    if valid is None:
        return narrowed(layer, kwargs)
    slots = torch.arange(valid.shape[1], device=valid.device)
    queries = torch.arange(hidden.shape[1], device=valid.device)
    last = layer.cumulative_length.to(valid.device) + queries
    allowed = valid[:, None, None, :] & (slots[None, :] <= last[:, None])
    kwargs = {**kwargs, "attention_mask": as_mask(allowed, kwargs.get("attention_mask"))}
    padding = getattr(layer, PADDING, None)
    if padding is not None:
        kwargs["position_embeddings"] = located.text.rotary_emb(hidden, last - padding[:, None])
    return kwargs


def _report_length(layer: Any, dropped: int) -> None:
    """Let a cache layer that was cut before layer 0 report the length of the whole prompt.

    Positions of new tokens are counted from layer 0's length. A reset ends it.
    """
    if is_static(layer):
        _put(layer, DROPPED, torch.full_like(layer.cumulative_length, dropped))
    else:
        setattr(layer, DROPPED, dropped)
    layer.get_seq_length = types.MethodType(_length_of_prompt, layer)
    layer.reset = types.MethodType(_reset, layer)


def _length_of_prompt(layer: Any) -> Any:
    return type(layer).get_seq_length(layer) + getattr(layer, DROPPED)


def _reset(layer: Any) -> None:
    for name in (DROPPED, "get_seq_length", "reset"):
        layer.__dict__.pop(name, None)
    layer.reset()


def _so_far(valid: torch.Tensor, columns: int) -> torch.Tensor:
    """The caller's mask of so many columns, as bool: one for a static cache may go on to its end."""
    if valid.shape[1] < columns:
        raise ValueError(
            f"attention_mask has {valid.shape[1]} columns, but the cache and the new tokens have {columns}; "
            "pass one for the whole conversation"
        )
    return valid[:, :columns].bool()


class Decode:
    """One forward of new tokens on a pruned cache."""

    def __init__(
        self,
        located: Located,
        pruned: PrunedCache,
        cache: Any,
        queries: int,
        valid: torch.Tensor | None,
    ):
        self.located, self.pruned, self.cache = located, pruned, cache
        self.implementation = located.implementation
        self.queries = queries
        # A static cache counts on the device, and its layers need no count here.
        static = is_static(cache.layers[0])
        if not static and (cropped := pruned.prompt_length - cache.get_seq_length()) > 0:
            pruned.shorten(cropped)
        self.past = 0 if static else cache.get_seq_length() - pruned.prompt_length
        if queries > 1 and valid is not None:
            valid = _so_far(valid, int(cache.get_seq_length()) + queries)
            pruned.has_gaps = pruned.has_gaps or pruned.hides(valid)
            if static and pruned.has_gaps:
                for layer, stage in zip(cache.layers, pruned.stage_of_layer, strict=False):
                    _hide(layer, stage.tokens, valid, pruned.prompt_length)
        self.valid = valid.bool() if valid is not None and pruned.has_gaps else None
        # Whether a new token sees all that is there, so that it needs no mask.
        self.sees_all = queries == 1 and pruned.sees_all(located.windows)
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
