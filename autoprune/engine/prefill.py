"""One prefill: observe, ask the method, cut, and carry masks and positions along."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..errors import UnsupportedError
from ..method import Needs, Observation, PromptState, Selection
from .cache import PrunedCache, Stage, is_static
from .layout import Layout, Tokens, length_mask, pad_rows
from .masks import BlockMask, causal_mask, gather_block_mask, gather_mask, row_mask
from .positions import compacted_positions, take_columns
from .tap import row_attention

if TYPE_CHECKING:
    from .attach import Attachment
    from .vision import VisionView

# Arguments of decoder layers that follow the sequence but are sliced here, or are known not to matter.
HANDLED = {"attention_mask", "position_embeddings", "position_ids", "past_key_values"}


class _SeenEnough(Exception):
    """Ends a layer that was only run to see its attention."""


@dataclass
class CutRecord:
    """What one cut left, for the trace: device tensors, read later."""

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
        self.records: list[CutRecord] = []
        self.vision = self._by_prompt(vision, device)
        self.deepstack = deepstack
        self.armed: Needs | None = None
        self.attention: torch.Tensor | None = None
        self.projections: tuple[torch.Tensor, torch.Tensor] | None = None
        self.peeking = False
        # Without position ids the model numbers padding too; compacted positions never do, in any layer.
        self.counts_positions = self.method.positions == "compacted" and self.tokens.padded
        self._slices: dict[tuple, tuple[Any, Any]] = {}
        self.method.begin(state)

    def _by_prompt(
        self, vision: VisionView | None, device: torch.device
    ) -> dict[str, torch.Tensor]:
        """What the tower gave, [prompts, N, ...], filled with NaN (or False) behind a prompt's own."""
        stacked = {}
        for name, rows in (vision.per_prompt(self.layout.num_visual) if vision else {}).items():
            fill = False if rows[0].dtype == torch.bool else float("nan")
            padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=fill)
            stacked[name] = padded.to(device)
        return stacked

    def before_layer(self, index: int, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """Cut what is due before layer `index`, then hand the layer what fits the remaining tokens."""
        if self.cache is None:
            # A plain forward makes its cache inside the decoder.
            self.cache = kwargs.get("past_key_values")
        if 0 < index <= len(self.deepstack):
            args = (self._add_deepstack(args[0], self.deepstack[index - 1]), *args[1:])
        needs = self.armed if index else self.method.needs(0, self.state)
        if needs is not None:
            if needs.ahead:
                self._peek(index, needs, args, kwargs)
            hidden = self._cut(index, needs, args[0])
            args = (hidden, *args[1:])
        self.attention = self.projections = None
        last = index + 1 == len(self.located.layers)
        self.armed = None if last else self.method.needs(index + 1, self.state)
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
        self.armed, self.peeking = needs, True
        try:
            self.located.layers[index].forward(*args, **kwargs)
        except _SeenEnough:
            pass
        finally:
            self.peeking = False

    def _add_deepstack(self, hidden: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        """Add one level of deepstack features (flat over all visual tokens) to those still present.

        The models do this at full length after a layer; here it waits for the next layer's hook.
        """
        first = np.cumsum([0, *self.layout.num_visual[:-1]])
        visual = self.tokens.visual.to(hidden.device)
        row = visual.clamp(min=0) + torch.from_numpy(first).to(hidden.device)[:, None]
        original = (visual >= 0)[..., None]
        features = features.to(hidden.device, hidden.dtype)
        return torch.where(original, hidden + features[row], hidden)

    def observe(
        self, module, query, key, attention_mask, scaling=None, softcap=None, **kwargs
    ) -> None:
        """Compute the attention rows that the next cut asked for, and remember its projections."""
        if self.armed is None or self.armed.ahead != self.peeking:
            return
        key = key[:, :, : self.tokens.width]
        if self.armed.keys:
            self.projections = query, key
        if self.armed.rows is not None:
            self.attention = self._attend(query, key, attention_mask, scaling, softcap)
        if self.peeking:
            raise _SeenEnough

    def _attend(self, query, key, attention_mask, scaling, softcap) -> torch.Tensor:
        """Attention of the rows asked for to the visual tokens, [batch, heads, rows, V]."""
        slots, text_mask = self._rows(self.armed.rows)
        slots = slots.to(query.device)  # a layer may live on another device than the prompt
        rows = _take(query, slots)
        blocked, bias = row_mask(attention_mask, self.tokens, slots)
        attention = row_attention(rows, key, scaling, blocked, bias, softcap)
        visual = self.tokens.slots().to(query.device)
        visual = visual[:, None, None, :].expand(*attention.shape[:3], -1)
        return attention.gather(3, visual).to(text_mask.device)

    def _rows(self, rows: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Where the scoring rows are in the present sequence, [batch, rows], and which are real."""
        columns = self.layout.text_columns(rows)
        device = self.tokens.column.device
        counts = [len(c) for c in columns]
        wanted = self._memo(
            ("rows", rows), None, lambda: torch.from_numpy(pad_rows(columns, 0)).to(device)
        )
        if len(self.stages) == 1:
            slots = wanted
        else:
            # Columns ascend behind the padding (-1), so a search finds each row's place.
            slots = torch.searchsorted(self.tokens.column, wanted).clamp(max=self.tokens.width - 1)
        return slots, length_mask(counts, wanted.shape[1], device)

    def _cut(self, index: int, needs: Needs, hidden: torch.Tensor) -> torch.Tensor:
        selection = self.method.select(self._observation(index, needs, hidden), self.state)
        if selection is None or self._keeps_all(selection):
            return hidden
        self._check(index, selection)
        self.tokens, source = self.tokens.after(selection)
        if selection.merged is not None:
            hidden = torch.cat([hidden, selection.merged.hidden.to(hidden)], dim=1)
        hidden = _take(hidden, source)
        if selection.states is not None:
            slots = self.tokens.slots().to(hidden.device)[..., None]
            slots = slots.expand(-1, -1, hidden.shape[2])
            real = self.tokens.slot_mask().to(hidden.device)[..., None]
            states = torch.where(real, selection.states.to(hidden), hidden.gather(1, slots))
            hidden = hidden.scatter(1, slots, states)
        self.stages.append(Stage(index, self.tokens))
        self.records.append(CutRecord(index, self.tokens.visual, self.tokens.counts))
        return hidden

    def _observation(self, index: int, needs: Needs, hidden: torch.Tensor) -> Observation:
        tokens = self.tokens
        slots, mask = tokens.slots(), tokens.slot_mask()
        visual = tokens.visual.gather(1, slots).masked_fill(~mask, -1)
        if (needs.rows is not None and self.attention is None) or (
            needs.keys and self.projections is None
        ):
            raise UnsupportedError(
                f"the attention of decoder layer {index - (not needs.ahead)} was not seen: "
                f"the backend {self.located.implementation!r} does not go through transformers' "
                "attention functions; use attn_implementation='sdpa'"
            )
        seen = Observation(index, list(tokens.counts), visual, mask, self.attention)
        if needs.rows is not None or needs.hidden or needs.keys:
            text, seen.text_mask = self._rows(needs.rows or "text")
        if needs.hidden:
            seen.hidden, seen.text_hidden = (
                partial(_take, hidden, slots),
                partial(_take, hidden, text),
            )
        if needs.keys:
            query, key = self.projections
            seen.keys, seen.text_keys = partial(_take, key, slots), partial(_take, key, text)
            seen.queries = partial(_take, query, slots)
        if needs.vision:
            self._add_vision(seen, visual)
        return seen

    def _add_vision(self, seen: Observation, visual: torch.Tensor) -> None:
        original = visual.clamp(min=0)
        for name, values in self.vision.items():
            index = original.view(*original.shape, *[1] * (values.ndim - 2))
            taken = values.gather(1, index.expand(-1, -1, *values.shape[2:]))
            absent = False if values.dtype == torch.bool else float("nan")
            setattr(seen, name, taken.masked_fill((visual < 0).view(index.shape), absent))

    def _keeps_all(self, selection: Selection) -> bool:
        return selection.merged is None and list(selection.counts) == self.tokens.counts

    def _check(self, index: int, selection: Selection) -> None:
        for prompt, (new, old) in enumerate(zip(selection.counts, self.tokens.counts, strict=True)):
            if not 0 <= new <= old:
                raise ValueError(
                    f"{type(self.method).__name__} keeps {new} of {old} visual tokens of prompt {prompt} "
                    f"at cut {index}; a cut can only keep between 0 and all of them"
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
        key = (len(self.stages), kind, id(source))
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
        return tuple(take_columns(part, self.tokens.column, dim=-2) for part in embeddings)

    def _compacted(self, hidden: torch.Tensor) -> tuple:
        def rotate():
            return self.located.text.rotary_emb(hidden, compacted_positions(self.tokens))

        return self._memo("compacted", None, rotate)

    def _position_ids(self, ids: torch.Tensor) -> torch.Tensor:
        if "flash" in self.located.implementation and ids.shape[-2] == 1:
            # Gaps in the positions would look like several packed sequences to flash attention.
            return torch.arange(self.tokens.width, device=ids.device)[None].expand_as(
                ids[..., : self.tokens.width]
            )
        if self.method.positions == "compacted":
            return compacted_positions(self.tokens)
        return take_columns(ids[..., None], self.tokens.column, dim=-2)[..., 0]

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
        output["last_hidden_state"] = self._restore(output["last_hidden_state"], self.tokens)
        if output.get("hidden_states") is not None:
            output["hidden_states"] = tuple(
                states
                if states is None
                else self._restore(states, self.stage_of(max(i - 1, 0)).tokens)
                for i, states in enumerate(output["hidden_states"])
            )
        if self.cache is not None:
            PrunedCache.remember(self)
        return output

    def stage_of(self, layer: int) -> Stage:
        """The tokens that layer `layer` ran on."""
        return next(stage for stage in reversed(self.stages) if stage.first_layer <= layer)

    def _restore(self, states: torch.Tensor, tokens: Tokens) -> torch.Tensor:
        length = self.layout.real.shape[1]
        if tokens is self.stages[0].tokens:
            return states
        from_prompt = (tokens.column >= 0) & (tokens.visual != -2)
        column = torch.where(from_prompt, tokens.column, length).to(states.device)
        full = states.new_zeros(states.shape[0], length + 1, states.shape[2])
        return full.scatter_(1, column[..., None].expand_as(states), states)[:, :length]


def _take(states: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    """Entries of [batch, n, size] or [batch, heads, n, size] at `slots` [batch, m]."""
    index = slots.to(states.device).view(slots.shape[0], *[1] * (states.ndim - 3), -1, 1)
    shape = (*states.shape[:-2], slots.shape[1], states.shape[-1])
    return states.gather(states.ndim - 2, index.expand(shape))
