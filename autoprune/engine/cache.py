"""What a shrunken cache remembers of its prompt, and what a static one is told of it."""

from __future__ import annotations

import types
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from ..errors import UnsupportedError
from ..transfer import to_device
from .masks import as_mask
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

    def hide(self, cache: Any, valid: torch.Tensor) -> None:
        """Tell the layers of a static cache what the caller's mask, as for `hides`, hides."""
        first = self.prompt_length
        for layer, stage in zip(cache.layers, self.stage_of_layer, strict=False):
            column, width = stage.tokens.column, stage.tokens.width
            seen = getattr(layer, VALID).clone()
            seen[:, :width] = valid.gather(1, column.clamp(min=0)) & (column >= 0)
            seen[:, width : width + valid.shape[1] - first] = valid[:, first:]
            _put(layer, VALID, seen)

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
