"""One prefill: observe, ask the method, cut, and carry masks and positions along."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..contract import Needs, PromptState, Selection
from ..parts.transfer import to_device
from ..trace import Prefilled
from .attention.arguments import LayerArguments
from .attention.rows import Observer, SeenEnough
from .attention.tap import no_plans
from .cache.argument import cache_of, without_cache
from .cache.pruned import PrunedCache
from .refusals import refuse_unseen_attention
from .tokens.cut import cut, with_last_tokens
from .tokens.layout import Layout
from .tokens.packing import WORTH_PACKING, Packing, can_pack, watches_inputs
from .tokens.present import MERGED, Tokens

if TYPE_CHECKING:
    from ..contract import MethodContract
    from .locate import Located
    from .vision.view import VisionView


@dataclass(eq=False)
class Stage:
    """The tokens entering `first_layer` and the layers behind it up to the next cut."""

    first_layer: int
    tokens: Tokens


@dataclass
class CutRecord:
    """What one cut left, for the trace: device tensors, read later.

    visual, counts, width: of the `Tokens`. packed: whether the layers behind it compute no padding.
    """

    layer: int
    visual: torch.Tensor
    counts: list[int]
    width: int
    packed: bool


class Prefill:
    """State of one forward over the prompts. Lives on the forward's own context, never on the method."""

    def __init__(
        self,
        method: MethodContract,
        located: Located,
        layout: Layout,
        state: PromptState,
        device: torch.device,
        cache: Any,
        vision: VisionView | None,
        deepstack: Sequence[torch.Tensor] = (),
    ):
        self.method, self.located = method, located
        self.implementation = located.implementation
        self.layout, self.state, self.cache = layout, state, cache
        self.tokens = Tokens.of(layout, device)
        self.stages = [Stage(0, self.tokens)]
        self.packings: list[Packing | None] = [None]
        self.records: list[CutRecord] = []
        # Bytes that were kept of a layer's attention, or beside its hidden states, while it ran.
        self.observed: dict[int, int] = {}
        # Bytes that the look at a layer's attention took while the layer attended.
        self.looked: dict[int, int] = {}
        # The layer that runs on a packed row, until its attention was seen and its cache holds the batch.
        self.unsettled: int | None = None
        self.attention_seen = False
        # Prompts that have rotary embeddings in common.
        self.sharing = 1
        self.observer = Observer(layout, vision, device)
        self.deepstack = deepstack
        # Without position ids the model numbers padding too; compacted positions never do, in any layer.
        self.counts_positions = self.method.positions == "compacted" and self.tokens.padded
        length = layout.real.shape[1]
        self.arguments = LayerArguments(self.located, self.method.positions, self.tokens, length)
        self.method.begin(state)

    @cached_property
    def is_watched(self) -> bool:
        """Whether something hooked into the layers may count on the batch dimension."""
        return watches_inputs(self.located.layers)

    @property
    def packing(self) -> Packing | None:
        """How hidden states are packed at present; None where they are [batch, n, hidden size]."""
        return self.packings[-1]

    def before_layer(self, index: int, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """Cut what is due before layer `index`, then hand the layer what fits the remaining tokens."""
        self._settle()
        if self.cache is None:
            # A plain forward makes its cache inside the decoder.
            self.cache = cache_of(kwargs)
        if index == 0 and (embeddings := kwargs.get("position_embeddings")) is not None:
            one = embeddings if isinstance(embeddings, torch.Tensor) else embeddings[0]
            self.sharing = len(self.layout.real) // one.shape[-3]
        if 0 < index <= len(self.deepstack):
            args = (self._add_deepstack(args[0], self.deepstack[index - 1]), *args[1:])
        if kept := self.observer.kept_bytes:
            self.observed[index - 1] = self.observed.get(index - 1, 0) + kept
        if looked := self.observer.looked_bytes:
            self.looked[index - 1] = looked
        entering = args[0]
        needs = self.observer.needs if index else self.method.needs(0, self.state)
        if needs is not None:
            if needs.each(ahead=True):
                self._peek(index, needs, args, kwargs)
            hidden = self._cut(index, needs, entering)
            args = (hidden, *args[1:])
        if args[0] is entering and 0 < index <= len(self.deepstack):
            # The model holds the states without the features.
            self.observed[index] = entering.nbytes
        last = index + 1 == len(self.located.layers)
        self.observer.expect(None if last else self.method.needs(index + 1, self.state))
        self.unsettled, self.attention_seen = None if self.packing is None else index, False
        return args, self._fit(index, args[0], kwargs)

    def _fit(self, index: int, hidden: torch.Tensor, kwargs: dict) -> dict:
        """The layer's keyword arguments for the tokens that are present."""
        if len(self.stages) > 1:
            layers = getattr(self.cache, "layers", ())
            return self.arguments.fit(
                layers[index] if index < len(layers) else None, hidden, kwargs
            )
        if self.counts_positions:
            return {**kwargs, "position_embeddings": self.arguments.compacted(hidden)}
        return kwargs

    def _peek(self, index: int, needs: Needs, args: tuple, kwargs: dict) -> None:
        """Run layer `index` up to its attention, for methods that look ahead."""
        kwargs = without_cache(self._fit(index, args[0], kwargs))
        # What was seen of the layer before stays.
        self.observer.needs, self.observer.peeking = needs, True
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
        if packing is not None:
            packed = key, value
            query, key, value = map(packing.unpack_heads, (query, *packed))
            layers = getattr(self.cache, "layers", ())
            # A layer that is looked at ahead of its turn may not be in the cache yet.
            layer = layers[module.layer_idx] if module.layer_idx < len(layers) else None
            if layer is not None and layer.keys is packed[0] and layer.values is packed[1]:
                # What the layer has put into its cache is what its attention sees.
                layer.keys, layer.values = key, value
                self.unsettled = None
            self.attention_seen = True
        self.observer.see(self.tokens, query, key, attention_mask, **kwargs)
        with no_plans if len(self.stages) > 1 else nullcontext():
            output, weights = attend(module, query, key, value, attention_mask, *args, **kwargs)
        return (output if packing is None else packing.pack(output)), weights

    def _settle(self) -> None:
        """Bring what the last layer has put into its cache from a packed row into the form of a batch.

        It may be other than what attention sees: latents that keys are made of, for one.
        """
        index, packing = self.unsettled, self.packing
        if index is None or packing is None:
            return
        if not self.attention_seen:
            refuse_unseen_attention(self.located)
        self.unsettled = None
        if self.cache is not None:
            layer = self.cache.layers[index]
            layer.keys, layer.values = map(packing.unpack_heads, (layer.keys, layer.values))

    def _cut(self, index: int, needs: Needs, hidden: torch.Tensor) -> torch.Tensor:
        padded = hidden if self.packing is None or not needs.hidden else self.packing.unpack(hidden)
        seen = self.observer.observation(index, needs, self.tokens, padded)
        selection = self.method.select(seen, self.state)
        if selection is None or self._keeps_all(selection):
            return hidden
        self._check(index, selection)
        selection, forced = with_last_tokens(self.tokens, selection, self.layout.ends_visual)
        if self._keeps_all(selection):
            return hidden
        hidden = self._apply(selection, forced, hidden)
        self.stages.append(Stage(index, self.tokens))
        self.arguments.follow(self.tokens, self.packing)
        tokens = self.tokens
        packed = self.packing is not None
        self.records.append(CutRecord(index, tokens.index, tokens.counts, tokens.width, packed))
        return hidden

    def _apply(
        self, selection: Selection, forced: torch.Tensor | None, hidden: torch.Tensor
    ) -> torch.Tensor:
        """Hidden states of the tokens that stay: rows of the old ones, and of those that are new.

        forced: as `with_last_tokens` gives it.
        """
        rows, before, width = [hidden.flatten(0, 1)], self.packing, self.tokens.width
        self.tokens, source = cut(
            self.tokens, selection, None if forced is None else self.layout.ends_visual
        )
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
            if forced is not None:
                # Such a token is the last visual one of its prompt, behind merged ones, too.
                last = to_device([n - 1 for n in self.tokens.counts], device)[:, None]
                place = torch.arange(changed.shape[1], device=device)
                stays = (place == last) & forced.any(dim=1, keepdim=True)
                changed = torch.where(stays, source.gather(1, self.tokens.slots), changed)
            source = self.tokens.spread(changed, source)
            rows.append(states.flatten(0, 1))
        self.packings.append(self._pack_if_worth_it())
        if batch == 1 and len(rows) == 1:
            return hidden.index_select(1, source[0].to(hidden.device))
        if self.packing is not None:
            source = self.packing.pack(source)
        pool = torch.cat([r.to(hidden) for r in rows]) if len(rows) > 1 else rows[0]
        return pool.index_select(0, source.flatten().to(pool.device)).unflatten(0, source.shape)

    def _pack_if_worth_it(self) -> Packing | None:
        tokens, has_windows = self.tokens, any(self.located.windows)
        if tokens.waste < WORTH_PACKING:
            return None
        if not can_pack(self.cache, self.implementation, has_windows) or self.is_watched:
            return None
        return Packing(tokens)

    def _keeps_all(self, selection: Selection) -> bool:
        return selection.merged is None and list(selection.counts) == self.tokens.counts

    def _check(self, index: int, selection: Selection) -> None:
        for prompt, (new, old) in enumerate(zip(selection.counts, self.tokens.counts, strict=True)):
            if not 0 <= new <= old:
                raise ValueError(
                    f"{type(self.method).__name__} keeps {new} of {old} visual tokens of prompt {prompt} "
                    f"at cut {index}; a cut can only keep between 0 and all of them"
                )
        batch, most = len(selection.counts), max(selection.counts)
        for what, given in (("kept", selection.kept), ("states", selection.states)):
            if given is not None and (len(given) != batch or given.shape[1] < most):
                raise ValueError(
                    f"{type(self.method).__name__} gives {what} of shape {list(given.shape)} at cut {index}, "
                    f"but keeps up to {most} tokens; expected [{batch}, that many or more], padding last"
                )

    def finish(self, output: Any) -> Any:
        """Put the remaining tokens' states back to their columns and remember the cut on the cache."""
        self._settle()
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
            entering = [self.stage_of(layer).tokens for layer in range(len(self.located.layers))]
            compacted = self.method.positions == "compacted"
            PrunedCache.remember(
                self.cache, entering, self.layout, compacted, backend=self.implementation
            )
        return output

    def record(self) -> Prefilled:
        return Prefilled(
            self.layout, self.state, self.records, self.observed, self.sharing, self.looked
        )

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
        # A column more takes what has none.
        column = tokens.column.masked_fill(merged | (tokens.column < 0), length).to(states.device)
        full = states.new_zeros(states.shape[0], length + 1, states.shape[2])
        first = torch.arange(0, len(full) * (length + 1), length + 1, device=states.device)
        row = (column + first[:, None]).flatten()
        full.flatten(0, 1).index_copy_(0, row, states.flatten(0, 1))
        return full[:, :length]


def _count(batch: int, width: int, start: int, device: torch.device) -> torch.Tensor:
    """start, start + 1, ... as [batch, width]."""
    return torch.arange(start, start + batch * width, device=device).view(batch, width)
