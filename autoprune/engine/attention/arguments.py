"""What a decoder layer is given beside hidden states, cut to the tokens that are present."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from ...contract import Positions
from ...errors import UnsupportedError
from ..cache import argument as cache_argument
from ..cache.static import is_static
from ..locate import Located
from ..tokens.packing import Packing
from ..tokens.present import Tokens
from .masks import BlockMask, causal_mask, gather_block_mask, gather_mask
from .positions import compacted_positions, take_columns

# Arguments that follow the sequence but are sliced here, or are known not to matter.
HANDLED = {"attention_mask", "position_embeddings", "position_ids", *cache_argument.NAMES}


# Cosine and sine, or both as one complex tensor (DeepSeek-V2): each [batch or 1, S, size], or [3, ...].
Rotary = tuple[torch.Tensor, ...] | torch.Tensor


class LayerArguments:
    """Keyword arguments of the layers of one prefill; what the layers between two cuts share is made once.

    Args:
        tokens: those present at first.
        length: columns of the whole prompt.
    """

    def __init__(self, located: Located, positions: Positions, tokens: Tokens, length: int):
        self.located, self.positions, self.length = located, positions, length
        self.implementation = located.implementation
        # The whole prompt's, for all cuts.
        self._rotations: dict[int, tuple[Any, torch.Tensor]] = {}
        self.follow(tokens, None)

    def follow(self, tokens: Tokens, packing: Packing | None) -> None:
        """Go on with the tokens that a cut left, and with how hidden states hold them."""
        self.tokens, self.packing = tokens, packing
        self._made: dict[Any, tuple[Any, Any]] = {}

    def fit(self, layer: Any, hidden: torch.Tensor, kwargs: dict) -> dict:
        """`kwargs` for the tokens present; `layer`: the cache's layer, or None.

        Raises:
            UnsupportedError: a mask or an argument that cannot be cut.
        """
        kwargs = dict(kwargs)
        self._guard(kwargs)
        keys = layer.max_cache_len if is_static(layer) else self.tokens.width
        mask = kwargs.get("attention_mask")
        kwargs["attention_mask"] = self._once(("mask", keys), mask, lambda: self._mask(mask, keys))
        embeddings = kwargs.get("position_embeddings")
        if embeddings is not None:
            kwargs["position_embeddings"] = self._once(
                "rotary", embeddings, lambda: self._rotary(embeddings, hidden)
            )
        ids = kwargs.get("position_ids")
        if ids is not None:
            kwargs["position_ids"] = self._once("ids", ids, lambda: self._position_ids(ids))
        return kwargs

    def compacted(self, hidden: torch.Tensor) -> Rotary:
        """Rotary embeddings of compacted positions."""

        def rotate():
            embeddings = self.located.text.rotary_emb(hidden, compacted_positions(self.tokens))
            return _like(embeddings, self._packed(_parts(embeddings), dim=-3))

        return self._once("compacted", None, rotate)

    def _once(self, kind: Any, source: Any, make: Callable[[], Any]) -> Any:
        """The model hands the same objects to many layers; they are held, so that ids stay theirs."""
        key = kind, id(source)
        if key not in self._made:
            self._made[key] = source, make()
        return self._made[key][1]

    def _mask(self, mask: Any, keys: int) -> Any:
        tokens, implementation = self.tokens, self.implementation
        if isinstance(mask, torch.Tensor) and mask.ndim == 2:
            return (tokens.column >= 0).to(mask.dtype) if tokens.padded else None
        if mask is None and "flash" in implementation:
            return (tokens.column >= 0).to(torch.long) if tokens.padded else None
        if mask is None and not tokens.padded:
            return None
        if mask is None:
            return causal_mask(tokens, keys)
        if isinstance(mask, torch.Tensor) and mask.ndim == 4:
            return gather_mask(mask, tokens, keys)
        if isinstance(mask, BlockMask):
            return gather_block_mask(mask, tokens, keys)
        raise UnsupportedError(
            f"attention masks of type {type(mask).__name__} are not supported; "
            "use attn_implementation 'sdpa', 'eager', 'flash_attention_2' or 'flex_attention'"
        )

    def _rotary(self, embeddings: Rotary, hidden: torch.Tensor) -> Rotary:
        if self.positions == "compacted":
            return self.compacted(hidden)
        if id(embeddings) not in self._rotations:
            # Cosine and sine in one tensor are taken from in one go; the source is held, as above.
            self._rotations[id(embeddings)] = embeddings, torch.stack(_parts(embeddings))
        taken = self._take(self._rotations[id(embeddings)][1], dim=-2)
        return _like(embeddings, taken.unbind(0))

    def _position_ids(self, ids: torch.Tensor) -> torch.Tensor:
        width = self.tokens.width
        if "flash" in self.implementation and ids.shape[-2] == 1:
            # Gaps in the positions would look like several packed sequences to flash attention.
            return torch.arange(width, device=ids.device)[None].expand_as(ids[..., :width])
        if self.positions == "compacted":
            return self._packed([compacted_positions(self.tokens)], dim=-2)[0]
        return self._take(ids, dim=-1)

    def _take(self, values: torch.Tensor, dim: int) -> torch.Tensor:
        """`take_columns` of the tokens present, in the form of hidden states."""
        if self.packing is None:
            return take_columns(values, self.tokens.some_column, dim)
        own, length = values.shape[dim - 1 :][:2]
        if own > 1:
            # What the prompts do not share, in one row.
            values = values.flatten(dim - 1, dim).unsqueeze(dim - 1)
        column = self._once(("column", own, length), None, lambda: self._packed_column(own, length))
        return take_columns(values, column, dim)

    def _packed_column(self, own: int, length: int) -> torch.Tensor:
        """LongTensor [1, total], where the packed tokens come from: columns if `own` is 1, and else places
        in the columns of all prompts, joined.
        """
        assert self.packing is not None
        column = self.tokens.column
        if own > 1:
            first = torch.arange(0, own * length, length, device=column.device)
            column = column + first[:, None]
        return self.packing.pack(column)

    def _packed(self, values: Sequence[torch.Tensor], dim: int) -> tuple[torch.Tensor, ...]:
        """Tensors [..., batch, n, ...], the batch in dimension `dim`, in the form of hidden states."""
        packing = self.packing
        if packing is None:
            return tuple(values)
        return tuple(packing.pack(value, value.ndim + dim) for value in values)

    def _guard(self, kwargs: dict) -> None:
        for name, value in kwargs.items():
            if name in HANDLED or not isinstance(value, torch.Tensor):
                continue
            if self.length in value.shape[1:]:
                raise UnsupportedError(
                    f"decoder layers of {type(self.located.text).__name__} take {name!r} of shape "
                    f"{list(value.shape)}, which follows the sequence and cannot be cut; "
                    "this decoder is not supported"
                )


def _parts(embeddings: Rotary) -> tuple[torch.Tensor, ...]:
    return (embeddings,) if isinstance(embeddings, torch.Tensor) else tuple(embeddings)


def _like(embeddings: Rotary, parts: tuple[torch.Tensor, ...]) -> Rotary:
    """`parts` in the form that `embeddings` came in."""
    return parts[0] if isinstance(embeddings, torch.Tensor) else parts
