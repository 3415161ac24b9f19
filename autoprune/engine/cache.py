"""Decoding on a shrunken cache: what each layer still holds, and the masks that follow from it."""

from __future__ import annotations

import types
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ..errors import UnsupportedError
from .layout import Tokens
from .masks import as_mask, decode_mask

if TYPE_CHECKING:
    from .attach import Attachment
    from .prefill import Prefill

ATTRIBUTE = "_autoprune"


@dataclass
class Stage:
    """The tokens entering `first_layer` and the layers behind it up to the next cut."""

    first_layer: int
    tokens: Tokens


@dataclass
class PrunedCache:
    """What was cut from a cache at prefill; it lives on the cache, so generations never share it.

    prompt_length: columns of the padded prompt; new tokens get the columns behind it.
    stage_of_layer: for each layer, the tokens of the prompt that its cache holds.
    compacted: whether new tokens continue each layer's own compacted positions.
    steps: new tokens so far, tracked for static caches, whose own count is on the device.
    has_gaps: whether a later turn brought padding of its own.
    """

    prompt_length: int
    stage_of_layer: list[Stage]
    compacted: bool
    steps: int = 0
    has_gaps: bool = False

    @classmethod
    def remember(cls, prefill: Prefill) -> None:
        cache, depth = prefill.cache, len(prefill.located.layers)
        stages = [prefill.stage_of(layer) for layer in range(depth)]
        length = prefill.layout.real.shape[1]
        setattr(cache, ATTRIBUTE, cls(length, stages, prefill.method.positions == "compacted"))
        if stages[0].tokens.width < length:
            _keep_length(cache.layers[0], length - stages[0].tokens.width)

    @classmethod
    def of(cls, cache: Any) -> PrunedCache | None:
        return getattr(cache, ATTRIBUTE, None)


def _keep_length(layer: Any, dropped: int) -> None:
    """Let a cache layer that was cut before layer 0 report the length of the whole prompt.

    Positions of new tokens are counted from layer 0's length.
    """
    layer.dropped_tokens = dropped
    plain = type(layer).get_seq_length
    layer.get_seq_length = types.MethodType(lambda self: plain(self) + self.dropped_tokens, layer)


class Decode:
    """One forward of new tokens on a pruned cache."""

    def __init__(
        self,
        attachment: Attachment,
        pruned: PrunedCache,
        cache: Any,
        queries: int,
        valid: torch.Tensor | None,
    ):
        self.located, self.pruned, self.cache = attachment.located, pruned, cache
        self.queries = queries
        seen = cache.get_seq_length()
        self.past = seen - pruned.prompt_length if isinstance(seen, int) else pruned.steps
        pruned.steps = self.past + queries
        if queries > 1 and valid is not None:
            pruned.has_gaps = pruned.has_gaps or not bool(valid[:, -queries:].all())
        self.valid = valid.bool() if valid is not None and pruned.has_gaps else None
        self._made: dict[Any, Any] = {}

    def before_layer(self, index: int, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        stage = self.pruned.stage_of_layer[index]
        layer = self.cache.layers[index]
        self._crop(layer, stage)
        kwargs = dict(kwargs)
        mask = kwargs.get("attention_mask")
        key = ("mask", stage.first_layer, id(mask), self._window(index), self._key_length(layer, stage))
        if key not in self._made:
            self._made[key] = self._mask(mask, stage, layer, self._window(index))
        kwargs["attention_mask"] = self._made[key]
        if self.pruned.compacted:
            key = ("rotary", stage.first_layer)
            if key not in self._made:
                positions = self._positions(stage)
                self._made[key] = self.located.text.rotary_emb(args[0], positions)
            kwargs["position_embeddings"] = self._made[key]
        return args, kwargs

    def _crop(self, layer: Any, stage: Stage) -> None:
        """Drop rejected draft tokens that a cropped cache left behind in the shorter layers."""
        keys = getattr(layer, "keys", None)
        if hasattr(layer, "max_cache_len") or getattr(layer, "is_sliding", False) or keys is None:
            return
        length = stage.tokens.width + self.past
        if keys.shape[-2] > length:
            layer.keys, layer.values = keys[..., :length, :], layer.values[..., :length, :]

    def _key_length(self, layer: Any, stage: Stage) -> int:
        if hasattr(layer, "max_cache_len"):
            return layer.max_cache_len
        if getattr(layer, "is_sliding", False):
            return layer.keys.shape[-2] + self.queries
        return stage.tokens.width + self.past + self.queries

    def _window(self, index: int) -> int | None:
        config = self.located.text.config
        types_ = getattr(config, "layer_types", None)
        if types_ is None or types_[index] != "sliding_attention":
            return None
        return config.sliding_window

    def _mask(self, mask: Any, stage: Stage, layer: Any, window: int | None) -> Any:
        tokens, length = stage.tokens, self._key_length(layer, stage)
        needed = tokens.padded or self.queries > 1 or window is not None or self.valid is not None
        static = hasattr(layer, "max_cache_len")
        if not needed and not static:
            return None
        device = tokens.column.device
        first = self.pruned.prompt_length
        new = torch.arange(first, first + self.past + self.queries, device=device)
        column = torch.cat([tokens.column, new.expand(tokens.column.shape[0], -1)], dim=1)
        if not static:
            # A sliding layer has let its oldest tokens go.
            column = column[:, column.shape[1] - length :]
        if "flash" in self.located.implementation:
            return self._flash_mask(column, window)
        allowed = decode_mask(column, new[self.past :], window, self.valid, length)
        like = mask if isinstance(mask, torch.Tensor) else None
        if like is None and self.located.implementation == "eager":
            like = layer.keys if getattr(layer, "keys", None) is not None else None
        return as_mask(allowed, like)

    def _flash_mask(self, column: torch.Tensor, window: int | None) -> torch.Tensor:
        if window is not None:
            raise UnsupportedError("flash attention with sliding windows cannot use a pruned cache; use sdpa")
        real = column >= 0
        if self.valid is not None:
            real = real & self.valid.gather(1, column.clamp(min=0))
        return real.long()

    def _positions(self, stage: Stage) -> torch.Tensor:
        device = stage.tokens.column.device
        start = torch.as_tensor(stage.tokens.lengths).to(device) + self.past
        return start[:, None] + torch.arange(self.queries, device=device)
