"""What a shrunken cache remembers of its prompt, and what a static one is told of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ...errors import UnsupportedError
from ...parts.transfer import to_device
from ..attention.masks import as_mask
from ..tokens.present import Tokens
from .held import DROPPED, HOLDING, PADDING, VALID, hold, holding, put, release
from .rows import Rows

if TYPE_CHECKING:
    from ..locate import Located
    from ..prefill import Prefill

DRAFTS = "_autoprune_drafts"


@dataclass(eq=False)
class PrunedCache:
    """What was cut from a cache at prefill; it lives on the cache's layers, so generations never share it.

    What belongs to a prompt is in `Rows`, which go where the rows of a layer go.

    prompt_length: columns of the padded prompt; new tokens get the columns behind it.
    tail: of these columns, how many of the last are text in every prompt.
    renumbered: for each stage, whether compacted positions are others than the model's own.
    compacted: whether new tokens continue each layer's own compacted positions.
    padded: whether a layer's cache holds padding.
    static: whether its layers have a fixed size.
    backend: the attention that the cache was filled by.
    has_gaps: whether a later turn hid tokens that came before it, or brought padding of its own.
    """

    prompt_length: int
    tail: int
    renumbered: tuple[bool, ...]
    compacted: bool
    padded: bool
    static: bool
    backend: str
    has_gaps: bool = False

    @classmethod
    def remember(cls, prefill: Prefill) -> None:
        layers, depth = prefill.cache.layers, len(prefill.located.layers)
        drafts, length = prefill.layout.drafts, prefill.layout.length
        stages = [prefill.stage_of(layer) for layer in range(depth)]
        own = list(dict.fromkeys(stages))
        held = [stage.tokens.without_last(drafts) for stage in own]
        pruned = cls(
            length,
            prefill.layout.tail,
            renumbered=tuple(tokens.renumbered for tokens in held),
            compacted=prefill.method.positions == "compacted",
            padded=any(tokens.padded for tokens in held),
            static=is_static(layers[0]),
            backend=prefill.implementation,
        )
        rows = Rows.of(held)
        for layer, stage in zip(layers, map(own.index, stages), strict=False):
            hold(layer, pruned, rows, stage)
            if is_static(layer):
                _mark_valid(layer, held[stage])
        if held[0].width < length:
            _report_length(layers[0], length - held[0].width)

    @staticmethod
    def of(cache: Any) -> PrunedCache | None:
        layers = getattr(cache, "layers", ())
        held = holding(layers[0]) if layers else None
        return None if held is None else held.pruned

    @property
    def has_like_rows(self) -> bool:
        """Whether all rows have their tokens at the same places, and none hides any."""
        return not (self.padded or self.has_gaps)

    def sees_all(self, windows: Sequence[int | None]) -> bool:
        """Whether a new token sees all that is there at the model's own positions, and needs no mask."""
        return self.has_like_rows and not self.compacted and not any(windows)

    def reason_for_hooks(self, new: int) -> str | None:
        """Why the plain model cannot go on with so many new tokens; None if it can."""
        if self.static:
            return "the slots of its layers do not hold the columns of the prompt any more"
        if self.padded:
            return "its prompts have different lengths in it, which only pruning makes masks for"
        if self.compacted and any(self.renumbered):
            return "its positions were numbered anew, which only pruning goes on with"
        if new > 1 and "flash" not in self.backend:
            return "several new tokens at once need masks of each layer's own"
        return None

    def shorten(self, cache: Any, columns: int) -> None:
        """Follow a cache that was cropped into its prompt, by so many of the last columns.

        Raises:
            UnsupportedError: not all of these are text in every prompt.
        """
        if columns > self.tail:
            raise UnsupportedError(
                f"the cache was cropped by {columns} columns of its pruned prompt, of which only the last "
                f"{self.tail} are text in every prompt; crop less, or run the prompt anew"
            )
        shorter: dict[Rows, Rows] = {}
        for held in filter(None, map(holding, cache.layers)):
            if held.rows not in shorter:
                shorter[held.rows] = held.rows.without_last(columns)
            held.rows = shorter[held.rows]
        self.prompt_length, self.tail = self.prompt_length - columns, self.tail - columns

    def hides(self, cache: Any, valid: torch.Tensor) -> bool:
        """Whether the caller's mask, bool [batch, columns so far], hides any that is held or given."""
        column = getattr(cache.layers[0], HOLDING).column
        shown = valid.gather(1, column.clamp(min=0)) | (column < 0)
        return not bool(shown.all() & valid[:, self.prompt_length :].all())

    def hide(self, cache: Any, valid: torch.Tensor) -> None:
        """Tell the layers of a static cache what the caller's mask, as for `hides`, hides."""
        first = self.prompt_length
        for layer in cache.layers:
            held = getattr(layer, HOLDING)
            column, width = held.column, held.width
            seen = getattr(layer, VALID).clone()
            seen[:, :width] = valid.gather(1, column.clamp(min=0)) & (column >= 0)
            seen[:, width : width + valid.shape[1] - first] = valid[:, first:]
            put(layer, VALID, seen)

    @staticmethod
    def forget(cache: Any) -> None:
        """Before a new prefill: a cache may be used again after a reset."""
        if cache is not None:
            cache.__dict__.pop(DRAFTS, None)
            for layer in getattr(cache, "layers", ()):
                release(layer)


def is_static(layer: Any) -> bool:
    """Whether a cache layer has a fixed size (its count of tokens is then a tensor on the device)."""
    return hasattr(layer, "max_cache_len")


def _mark_valid(layer: Any, tokens: Tokens) -> None:
    """Tell a static cache layer which of its slots hold real tokens; new tokens always are."""
    valid = torch.ones(tokens.column.shape[0], layer.max_cache_len, dtype=torch.bool)
    valid = valid.to(tokens.column.device)
    valid[:, : tokens.width] = tokens.column >= 0
    put(layer, VALID, valid)
    held = getattr(layer, HOLDING)
    if held.pruned.compacted and held.renumbered:
        padding = [tokens.width - n for n in tokens.lengths]
        put(layer, PADDING, to_device(padding, tokens.column.device))


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
    getattr(layer, HOLDING).expected = True
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
    """Let a cache layer that was cut before layer 0 report the length of the whole prompt."""
    if is_static(layer):
        put(layer, DROPPED, torch.full_like(layer.cumulative_length, dropped))
    else:
        setattr(layer, DROPPED, dropped)
