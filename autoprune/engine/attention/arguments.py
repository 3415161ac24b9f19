"""What a decoder layer is given beside hidden states, cut to the tokens that are present."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ...contract import Positions
from ...errors import UnsupportedError
from ..cache import argument as cache_argument
from ..cache.static import is_static
from ..locate import PER_LAYER_INPUT, Located
from ..refusals import refuse_sizes, refuse_sizes_in_hybrid
from ..tokens.cut import Stage
from ..tokens.present import Tokens
from .masks import BlockMask, CausalMasks, gather_block_mask, gather_mask, weighed

# Arguments that follow the sequence but are sliced here, or are known not to matter.
HANDLED = {
    "attention_mask",
    "position_embeddings",
    "position_ids",
    PER_LAYER_INPUT,
    *cache_argument.NAMES,
}

# Attention that reads no position ids; a user's own may.
WITHOUT_IDS = ("sdpa", "eager")

# Cosine and sine, or both as one complex tensor (DeepSeek-V2): each [batch or 1, S, size], or [3, ...].
Rotary = tuple[torch.Tensor, ...] | torch.Tensor


class LayerArguments:
    """Keyword arguments of the layers of one prefill; what the layers between two cuts share is made once.

    Args:
        stage: the first one.
        length: columns of the whole prompt.
    """

    def __init__(self, located: Located, positions: Positions, stage: Stage, length: int):
        self.located, self.positions, self.length = located, positions, length
        self.implementation = located.implementation
        self._masks = CausalMasks()
        # Cosine and sine of the whole prompt as one tensor, for all cuts.
        self._rotations: dict[int, tuple[Rotary, torch.Tensor]] = {}
        self._known: set[str] = set()
        # A layer's own code may read position ids.
        kinds = {type(attention): attention for attention in located.attending}.values()
        named = [inspect.signature(kind.forward).parameters for kind in kinds]
        self._needs_ids = located.implementation not in WITHOUT_IDS or any(
            "position_ids" in names for names in named
        )
        self.follow(stage)

    def follow(self, stage: Stage) -> None:
        """Go on with the layers behind a cut."""
        self.stage, self.tokens = stage, stage.tokens
        self._made: dict[Any, tuple[Any, Any]] = {}

    def fit(self, layer: Any, hidden: torch.Tensor, kwargs: dict, attends: bool) -> dict:
        """`kwargs` for the tokens present; `layer`: the cache's layer, or None.

        A layer that does not attend gets no mask but the one of padding.

        Raises:
            UnsupportedError: a mask or an argument that cannot be cut.
        """
        self._refuse_unknown(kwargs)
        keys = layer.max_cache_len if is_static(layer) else self.tokens.width
        mask, embeddings = kwargs.get("attention_mask"), kwargs.get("position_embeddings")
        fitting = {
            "attention_mask": self._once(
                ("mask", keys, attends),
                mask,
                lambda: self._mask(mask, keys, hidden.dtype) if attends else self._padding(mask),
            )
        }
        if embeddings is not None:
            fitting["position_embeddings"] = self._once(
                "rotary", embeddings, lambda: self._rotary(embeddings, hidden)
            )
        if (inputs := kwargs.get(PER_LAYER_INPUT)) is not None:
            # Each layer has another, so nothing is gained by taking it for later cuts, too.
            fitting[PER_LAYER_INPUT] = self._in_stage(inputs)
        if self._needs_ids and (ids := kwargs.get("position_ids")) is not None:
            fitting["position_ids"] = self._once("ids", ids, lambda: self._position_ids(ids))
        return {**kwargs, **fitting}

    def compacted(self, hidden: torch.Tensor) -> Rotary:
        """Rotary embeddings of compacted positions."""

        def rotate() -> Rotary:
            embeddings = self.located.text.rotary_emb(hidden, compacted_positions(self.tokens))
            return _like(embeddings, [self._packed(part, -3) for part in _parts(embeddings)])

        return self._once("compacted", None, rotate)

    def _once(self, kind: Any, source: Any, make: Callable[[], Any]) -> Any:
        """The model hands the same objects to many layers; they are held, so that ids stay theirs."""
        key = kind, id(source)
        if key not in self._made:
            self._made[key] = source, make()
        return self._made[key][1]

    def _mask(self, mask: Any, keys: int, dtype: torch.dtype) -> Any:
        tokens, flat = self.tokens, isinstance(mask, torch.Tensor) and mask.ndim == 2
        if tokens.bias is not None and (flat or "flash" in self.implementation):
            refuse_sizes(self.implementation)
        if flat:
            return (tokens.column >= 0).to(mask.dtype) if tokens.padded else None
        if mask is None and "flash" in self.implementation:
            return (tokens.column >= 0).to(torch.long) if tokens.padded else None
        if mask is None:
            plain = tokens.bias is None and not tokens.padded
            return None if plain else self._masks.of(tokens, keys, dtype)
        cut: Any = None
        if isinstance(mask, torch.Tensor) and mask.ndim == 4:
            cut = gather_mask(mask, tokens, keys)
        elif isinstance(mask, BlockMask):
            cut = gather_block_mask(mask, tokens, keys)
        if cut is not None:
            return cut if tokens.bias is None else weighed(cut, tokens, keys, dtype)
        raise UnsupportedError(
            f"attention masks of type {type(mask).__name__} are not supported; "
            "use attn_implementation 'sdpa', 'eager', 'flash_attention_2' or 'flex_attention'"
        )

    def _padding(self, mask: Any) -> torch.Tensor | None:
        """1 for tokens and 0 for padding, [batch, n], which stands on the left; None without any."""
        tokens = self.tokens
        if tokens.bias is not None:
            refuse_sizes_in_hybrid(self.located)
        dtype = torch.long if mask is None else mask.dtype
        return (tokens.column >= 0).to(dtype) if tokens.padded else None

    def _rotary(self, embeddings: Rotary, hidden: torch.Tensor) -> Rotary:
        if self.positions == "compacted":
            return self.compacted(hidden)
        if id(embeddings) not in self._rotations:
            # Cosine and sine in one tensor are taken from in one go; the source is held, as above.
            self._rotations[id(embeddings)] = embeddings, torch.stack(_parts(embeddings))
        taken = self._take(self._rotations[id(embeddings)][1], embeddings, dim=-2)
        return _like(embeddings, taken.unbind(0))

    def _position_ids(self, ids: torch.Tensor) -> torch.Tensor:
        width = self.tokens.width
        if "flash" in self.implementation and ids.shape[-2] == 1:
            # Gaps in the positions would look like several packed sequences to flash attention.
            return torch.arange(width, device=ids.device)[None].expand_as(ids[..., :width])
        if self.positions == "compacted":
            return self._packed(compacted_positions(self.tokens), -2)
        return self._take(ids, ids, dim=-1)

    def _take(self, values: torch.Tensor, source: Any, dim: int) -> torch.Tensor:
        """Those of the tokens present, in the form of hidden states.

        Args:
            values: [..., batch or 1, S], or with features behind it.
            source: what they were made of.
            dim: where S is: -1, or -2 with features.
        """
        columns, rows = self.stage.columns, self.stage.rows
        assert columns is not None and rows is not None
        taken = columns.take(values, source, dim).narrow(dim, rows.start, rows.stop - rows.start)
        batch = 1 if self.stage.packing is not None else self.tokens.batch
        return taken.unflatten(dim, (batch, -1))

    def _in_stage(self, values: torch.Tensor) -> torch.Tensor:
        """[batch, S, ...], of the tokens present, in the form of hidden states."""
        column = self.tokens.some_column.to(values.device)
        first = torch.arange(len(column), device=column.device)[:, None] * values.shape[1]
        rows = values.flatten(0, 1)[(column + first).flatten()]
        return self._packed(rows.unflatten(0, column.shape), -2)

    def _packed(self, values: torch.Tensor, dim: int) -> torch.Tensor:
        """[..., batch, n, ...], the batch in dimension `dim`, in the form of hidden states."""
        packing = self.stage.packing
        return values if packing is None else packing.pack(values, values.ndim + dim)

    def _refuse_unknown(self, kwargs: dict) -> None:
        for name, value in kwargs.items():
            if name in HANDLED or name in self._known or not isinstance(value, torch.Tensor):
                continue
            if self.length in value.shape[1:]:
                raise UnsupportedError(
                    f"decoder layers of {type(self.located.text).__name__} take {name!r} of shape "
                    f"{list(value.shape)}, which follows the sequence and cannot be cut; "
                    "this decoder is not supported"
                )
            self._known.add(name)


def compacted_positions(tokens: Tokens) -> torch.Tensor:
    """Positions 0, 1, ... over the real tokens of each prompt, [batch, n]."""
    return ((tokens.column >= 0).cumsum(dim=1) - 1).clamp(min=0)


def _parts(embeddings: Rotary) -> tuple[torch.Tensor, ...]:
    return (embeddings,) if isinstance(embeddings, torch.Tensor) else tuple(embeddings)


def _like(embeddings: Rotary, parts: Sequence[torch.Tensor]) -> Rotary:
    """`parts` in the form that `embeddings` came in."""
    return parts[0] if isinstance(embeddings, torch.Tensor) else tuple(parts)
