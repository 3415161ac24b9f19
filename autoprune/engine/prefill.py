"""One prefill: observe, ask the method, cut, and carry masks and positions along."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..errors import UnsupportedError
from ..method import Needs, PromptState, Selection
from ..transfer import to_device
from .cache import PrunedCache, Stage, is_static, sliding_window
from .layout import Layout
from .masks import BlockMask, causal_mask, gather_block_mask, gather_mask
from .observer import Observer, SeenEnough
from .packing import WORTH_PACKING, Packing, can_pack
from .positions import compacted_positions, take_columns
from .tokens import MERGED, Tokens

if TYPE_CHECKING:
    from .attach import Attachment
    from .vision_view import VisionView

# Arguments of decoder layers that follow the sequence but are sliced here, or are known not to matter.
HANDLED = {"attention_mask", "position_embeddings", "position_ids", "past_key_values"}


@dataclass
class CutRecord:
    """What one cut left, for the trace: device tensors, read later. `visual` is `Tokens.index`."""

    layer: int
    visual: torch.Tensor
    counts: list[int]


class Prefill:
    """State of one forward over the prompts. Lives on the forward's own context, never on the method."""

    def __init__(
        self,
        attachment: Attachment,
        layout: Layout,
        state: PromptState,
        device: torch.device,
        cache: Any,
        vision: VisionView | None,
        deepstack: Sequence[torch.Tensor] = (),
    ):
        self.method = attachment.method
        self.located = attachment.located
        self.layout, self.state, self.cache = layout, state, cache
        self.tokens = Tokens.of(layout, device)
        self.stages = [Stage(0, self.tokens)]
        self.packings: list[Packing | None] = [None]
        self.records: list[CutRecord] = []
        # Bytes that were kept of a layer's attention while the rest of it ran.
        self.observed: dict[int, int] = {}
        self.observer = Observer(layout, vision, device)
        self.deepstack = deepstack
        # Without position ids the model numbers padding too; compacted positions never do, in any layer.
        self.counts_positions = self.method.positions == "compacted" and self.tokens.padded
        self._slices: dict[tuple, tuple[Any, Any]] = {}
        self.method.begin(state)

    @property
    def packing(self) -> Packing | None:
        """How hidden states are packed at present; None where they are [batch, n, hidden size]."""
        return self.packings[-1]

    def before_layer(self, index: int, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """Cut what is due before layer `index`, then hand the layer what fits the remaining tokens."""
        if self.cache is None:
            # A plain forward makes its cache inside the decoder.
            self.cache = kwargs.get("past_key_values")
        if 0 < index <= len(self.deepstack):
            args = (self._add_deepstack(args[0], self.deepstack[index - 1]), *args[1:])
        if kept := self.observer.kept_bytes:
            self.observed[index - 1] = kept
        needs = self.observer.needs if index else self.method.needs(0, self.state)
        if needs is not None:
            if needs.ahead:
                self._peek(index, needs, args, kwargs)
            hidden = self._cut(index, needs, args[0])
            args = (hidden, *args[1:])
        last = index + 1 == len(self.located.layers)
        self.observer.expect(None if last else self.method.needs(index + 1, self.state))
        return args, self._arguments(index, args[0], kwargs)

    def _arguments(self, index: int, hidden: torch.Tensor, kwargs: dict) -> dict:
        """The layer's keyword arguments for the tokens that are present."""
        if len(self.stages) > 1:
            return self._fit(index, hidden, kwargs)
        if self.counts_positions:
            return {**kwargs, "position_embeddings": self._compacted(hidden)}
        return kwargs

    def _peek(self, index: int, needs: Needs, args: tuple, kwargs: dict) -> None:
        """Run layer `index` up to its attention, for methods that look ahead."""
        kwargs = {**self._arguments(index, args[0], kwargs), "past_key_values": None}
        self.observer.expect(needs)
        self.observer.peeking = True
        try:
            self.located.layers[index].forward(*args, **kwargs)
        except SeenEnough:
            pass
        finally:
            self.observer.peeking = False

    def _add_deepstack(self, hidden: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        """Add one level of deepstack features (flat over all visual tokens) to those still present.

        The models do this at full length after a layer; here it waits for the next layer's hook.
        """
        tokens, first = self.tokens, np.cumsum([0, *self.layout.num_visual[:-1]])
        row = tokens.index.clamp(min=0) + to_device(first, tokens.index.device)[:, None]
        row = tokens.spread(row, torch.zeros_like(tokens.column)).to(hidden.device)
        original = torch.zeros_like(tokens.column, dtype=torch.bool)
        original = tokens.spread(tokens.index >= 0, original).to(hidden.device)[..., None]
        features = features.to(hidden.device, hidden.dtype)[row]
        if self.packing is not None:
            original, features = self.packing.pack(original), self.packing.pack(features)
        return torch.where(original, hidden + features, hidden)

    def attend(
        self, attend, module, query, key, value, attention_mask, *args, **kwargs
    ) -> tuple[torch.Tensor, Any]:
        """The attention of one decoder layer, observed, and padded if its tokens came packed."""
        packing = self.packing
        if packing is None:
            self.observer.see(self.tokens, query, key, attention_mask, **kwargs)
            return attend(module, query, key, value, attention_mask, *args, **kwargs)
        query, key, value = map(packing.unpack_heads, (query, key, value))
        self.observer.see(self.tokens, query, key, attention_mask, **kwargs)
        if self.cache is not None:
            # The layer has put the packed row into its cache.
            layer = self.cache.layers[module.layer_idx]
            layer.keys, layer.values = key, value
        output, weights = attend(module, query, key, value, attention_mask, *args, **kwargs)
        return packing.pack(output), weights

    def _cut(self, index: int, needs: Needs, hidden: torch.Tensor) -> torch.Tensor:
        padded = hidden if self.packing is None or not needs.hidden else self.packing.unpack(hidden)
        seen = self.observer.observation(index, needs, self.tokens, padded)
        selection = self.method.select(seen, self.state)
        if selection is None or self._keeps_all(selection):
            return hidden
        self._check(index, selection)
        hidden = self._apply(selection, hidden)
        self.stages.append(Stage(index, self.tokens))
        self._slices.clear()
        self.records.append(CutRecord(index, self.tokens.index, self.tokens.counts))
        return hidden

    def _apply(self, selection: Selection, hidden: torch.Tensor) -> torch.Tensor:
        """Hidden states of the tokens that stay: rows of the old ones, and of those that are new."""
        rows, before, width = [hidden.flatten(0, 1)], self.packing, self.tokens.width
        self.tokens, source = self.tokens.after(selection)
        batch, device, merged = len(source), source.device, selection.merged
        if merged is not None:
            rows.append(merged.hidden.flatten(0, 1))
        if batch > 1:
            # From places in each prompt to rows of all of them.
            place = before.place if before else _count(batch, width, 0, device)
            if merged is not None:
                new = _count(batch, merged.hidden.shape[1], len(rows[0]), device)
                place = torch.cat([place, new], dim=1)
            source = place.gather(1, source)
        if selection.states is not None:
            states = selection.states[:, : max(self.tokens.counts)]
            changed = _count(batch, states.shape[1], sum(map(len, rows)), device)
            source = self.tokens.spread(changed, source)
            rows.append(states.flatten(0, 1))
        self.packings.append(self._pack_if_worth_it())
        if self.packing is not None:
            source = self.packing.pack(source)
        pool = torch.cat([r.to(hidden) for r in rows]) if len(rows) > 1 else rows[0]
        return pool.index_select(0, source.flatten().to(pool.device)).unflatten(0, source.shape)

    def _pack_if_worth_it(self) -> Packing | None:
        tokens, located = self.tokens, self.located
        if tokens.waste < WORTH_PACKING:
            return None
        config, layers = located.text.config, range(len(located.layers))
        has_windows = any(sliding_window(config, layer) is not None for layer in layers)
        if not can_pack(self.cache, located.implementation, has_windows):
            return None
        return Packing(tokens.column >= 0, sum(tokens.lengths))

    def _keeps_all(self, selection: Selection) -> bool:
        return selection.merged is None and list(selection.counts) == self.tokens.counts

    def _check(self, index: int, selection: Selection) -> None:
        for prompt, (new, old) in enumerate(zip(selection.counts, self.tokens.counts, strict=True)):
            if not 0 <= new <= old:
                raise ValueError(
                    f"{type(self.method).__name__} keeps {new} of {old} visual tokens of prompt {prompt} "
                    f"at cut {index}; a cut can only keep between 0 and all of them"
                )
        for what, given in (("kept", selection.kept), ("states", selection.states)):
            if given is not None and given.shape[1] < max(selection.counts):
                raise ValueError(
                    f"{type(self.method).__name__} gives {what} of shape {list(given.shape)} at cut {index}, "
                    f"but keeps up to {max(selection.counts)} tokens; expected [batch, that many or more], "
                    "padding last"
                )

    def _fit(self, index: int, hidden: torch.Tensor, kwargs: dict) -> dict:
        kwargs = dict(kwargs)
        self._guard(kwargs)
        mask = kwargs.get("attention_mask")
        kwargs["attention_mask"] = self._memo(
            ("mask", self._key_length(index)),
            mask,
            lambda: self._mask(mask, self._key_length(index), hidden),
        )
        embeddings = kwargs.get("position_embeddings")
        if embeddings is not None:
            kwargs["position_embeddings"] = self._memo(
                "rotary", embeddings, lambda: self._rotary(embeddings, hidden)
            )
        ids = kwargs.get("position_ids")
        if ids is not None:
            kwargs["position_ids"] = self._memo("ids", ids, lambda: self._position_ids(ids))
        return kwargs

    def _memo(self, kind: Any, source: Any, make):
        """Layers between two cuts receive the same objects, so each is sliced once."""
        key = kind, id(source)
        if key not in self._slices:
            self._slices[key] = (source, make())
        return self._slices[key][1]

    def _key_length(self, index: int) -> int:
        layers = getattr(self.cache, "layers", ())
        if index < len(layers) and is_static(layers[index]):
            return layers[index].max_cache_len
        return self.tokens.width

    def _mask(self, mask: Any, key_length: int, hidden: torch.Tensor) -> Any:
        if isinstance(mask, torch.Tensor) and mask.ndim == 2:
            return (self.tokens.column >= 0).to(mask.dtype) if self.tokens.padded else None
        if mask is None and "flash" in self.located.implementation:
            return (self.tokens.column >= 0).to(torch.long) if self.tokens.padded else None
        if mask is None or self.method.positions == "compacted":
            if mask is None and not self.tokens.padded:
                return None
            return causal_mask(self.tokens, mask, key_length)
        if isinstance(mask, torch.Tensor) and mask.ndim == 4:
            return gather_mask(mask, self.tokens, key_length)
        if isinstance(mask, BlockMask):
            return gather_block_mask(mask, self.tokens, key_length)
        raise UnsupportedError(
            f"attention masks of type {type(mask).__name__} are not supported; "
            "use attn_implementation 'sdpa', 'eager', 'flash_attention_2' or 'flex_attention'"
        )

    def _rotary(self, embeddings: tuple, hidden: torch.Tensor) -> tuple:
        if self.method.positions == "compacted":
            return self._compacted(hidden)
        parts = [take_columns(part, self.tokens.some_column, dim=-2) for part in embeddings]
        return self._packed(parts, dim=-3)

    def _compacted(self, hidden: torch.Tensor) -> tuple:
        def rotate():
            embeddings = self.located.text.rotary_emb(hidden, compacted_positions(self.tokens))
            return self._packed(embeddings, dim=-3)

        return self._memo("compacted", None, rotate)

    def _position_ids(self, ids: torch.Tensor) -> torch.Tensor:
        if "flash" in self.located.implementation and ids.shape[-2] == 1:
            # Gaps in the positions would look like several packed sequences to flash attention.
            return torch.arange(self.tokens.width, device=ids.device)[None].expand_as(
                ids[..., : self.tokens.width]
            )
        if self.method.positions == "compacted":
            ids = compacted_positions(self.tokens)
        else:
            ids = take_columns(ids[..., None], self.tokens.some_column, dim=-2)[..., 0]
        return self._packed([ids], dim=-2)[0]

    def _packed(self, values: Sequence[torch.Tensor], dim: int) -> tuple[torch.Tensor, ...]:
        """Tensors [..., batch, n, ...], the batch in dimension `dim`, in the form of hidden states."""
        packing = self.packing
        if packing is None:
            return tuple(values)
        return tuple(packing.pack(value, value.ndim + dim) for value in values)

    def _guard(self, kwargs: dict) -> None:
        length = self.layout.real.shape[1]
        for name, value in kwargs.items():
            if name in HANDLED or not isinstance(value, torch.Tensor):
                continue
            if length in value.shape[1:]:
                raise UnsupportedError(
                    f"decoder layers of {type(self.located.text).__name__} take {name!r} of shape "
                    f"{list(value.shape)}, which follows the sequence and cannot be cut; "
                    "this decoder is not supported"
                )

    def finish(self, output: Any) -> Any:
        """Put the remaining tokens' states back to their columns and remember the cut on the cache."""
        if len(self.stages) == 1 and not self.counts_positions:
            return output
        output["last_hidden_state"] = self._restore(output["last_hidden_state"], -1)
        if output.get("hidden_states") is not None:
            output["hidden_states"] = tuple(
                states
                if states is None
                else self._restore(states, self.stages.index(self.stage_of(max(i - 1, 0))))
                for i, states in enumerate(output["hidden_states"])
            )
        if self.cache is not None:
            PrunedCache.remember(self)
        return output

    def stage_of(self, layer: int) -> Stage:
        """The tokens that layer `layer` ran on."""
        return next(stage for stage in reversed(self.stages) if stage.first_layer <= layer)

    def _restore(self, states: torch.Tensor, stage: int) -> torch.Tensor:
        """Hidden states of a stage in the prompt's own columns, [batch, S, hidden size]."""
        length = self.layout.real.shape[1]
        tokens, packing = self.stages[stage].tokens, self.packings[stage]
        if tokens is self.stages[0].tokens:
            return states
        if packing is not None:
            states = packing.unpack(states)
        merged = torch.zeros_like(tokens.column, dtype=torch.bool)
        merged = tokens.spread(tokens.index == MERGED, merged)
        column = tokens.column.masked_fill(merged | (tokens.column < 0), length).to(states.device)
        full = states.new_zeros(states.shape[0], length + 1, states.shape[2])
        return full.scatter_(1, column[..., None].expand_as(states), states)[:, :length]


def _count(batch: int, width: int, start: int, device: torch.device) -> torch.Tensor:
    """start, start + 1, ... as [batch, width]."""
    return torch.arange(start, start + batch * width, device=device).view(batch, width)
