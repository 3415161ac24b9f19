"""One prefill: observe, ask the method, cut, and carry masks and positions along."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch

from ..contract import MethodContract, Needs, PromptState
from ..parts.transfer import to_device
from .attention.ahead import LooksAhead, few_projections, has_own_projections
from .attention.arguments import LayerArguments
from .attention.rows import Observer, SeenEnough, at_slots
from .attention.tap import no_plans
from .attention.temperature import at_positions, counts_positions
from .cache.argument import cache_of, without_cache
from .cache.pruned import PrunedCache
from .cuts import Cuts
from .locate import SHARED_KEYS, Located, named
from .record import Record
from .refusals import refuse_unseen_attention, refuse_unseen_layer
from .tokens.layout import Layout
from .tokens.packing import Packing, can_pack, watches_inputs
from .tokens.present import Tokens
from .vision.view import VisionView


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
        self.cuts = Cuts(method, layout, state, device, self._may_pack)
        # Bytes that were kept of a layer's attention, or beside its hidden states, while it ran.
        self.observed: dict[int, int] = {}
        # Bytes that the look at a layer's attention took while the layer attended.
        self.looked: dict[int, int] = {}
        self.ahead = LooksAhead(state.shape.cost, layout)
        # The layer that runs on a packed row, until its attention was seen and its cache holds the batch.
        self.unsettled: int | None = None
        self.attention_seen = False
        # Prompts that have rotary embeddings in common.
        self.sharing = 1
        self.observer = Observer(layout, vision, device)
        # What layers read of the keys of earlier ones, by these, since the last cut, and its bytes.
        self._shared: dict[int, tuple[Any, int]] = {}
        self.deepstack = deepstack
        # Without position ids the model numbers padding too; compacted positions never do, in any layer.
        self.counts_positions = self.method.positions == "compacted" and self.tokens.padded
        length = layout.real.shape[1]
        self.arguments = LayerArguments(located, method.positions, self.cuts.present, length)

    has_to_do = True

    @property
    def tokens(self) -> Tokens:
        """Those that are present."""
        return self.cuts.tokens

    @property
    def packing(self) -> Packing | None:
        """How hidden states are packed at present; None where they are [batch, n, hidden size]."""
        return self.cuts.packing

    def before_layer(self, index: int, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """Cut what is due before layer `index`, then hand the layer what fits the remaining tokens."""
        self._settle()
        args, kwargs = named(self.located.layers[index], args, kwargs)
        if index == 0:
            self._begin(kwargs)
        self._note_bytes(index)
        entering = hidden = self._add_deepstack(index, args[0])
        needs = self.observer.needs if index else self.method.needs(0, self.state)
        if needs is not None:
            if needs.each(ahead=True):
                self._peek(index, needs, hidden, args, kwargs)
            hidden = self._decide(index, needs, hidden)
        hidden = self.cuts.make_due(index, hidden)
        if self.cuts.present is not self.arguments.stage:
            self.arguments.follow(self.cuts.present)
            self._shared = {}
        if hidden is entering and 0 < index <= len(self.deepstack):
            # The model holds the states without the features.
            self.observed[index] = entering.nbytes
        last = index + 1 == len(self.located.layers)
        following = None if last else self.method.needs(index + 1, self.state)
        if following is not None:
            refuse_unseen_layer(self.located, index, index + 1, following, ahead=False)
        self.observer.expect(following)
        self.unsettled, self.attention_seen = None if self.packing is None else index, False
        fitting = self._fit(index, hidden, kwargs)
        if (columns := self.cuts.present.columns) is not None:
            held = columns.nbytes * (1 - self.cuts.present.share)
            self.observed[index] = self.observed.get(index, 0) + round(held)
        if copied := sum(size for _, size in self._shared.values()):
            self.observed[index] = self.observed.get(index, 0) + copied
        return (hidden, *args[1:]), fitting

    def _begin(self, kwargs: dict) -> None:
        if self.cache is None:
            # A plain forward makes its cache inside the decoder.
            self.cache = cache_of(kwargs)
        if (embeddings := kwargs.get("position_embeddings")) is not None:
            one = embeddings if isinstance(embeddings, torch.Tensor) else embeddings[0]
            self.sharing = len(self.layout.real) // one.shape[-3]

    def _note_bytes(self, index: int) -> None:
        if kept := self.observer.kept_bytes:
            self.observed[index - 1] = self.observed.get(index - 1, 0) + kept
        if looked := self.observer.looked_bytes:
            self.looked[index - 1] = looked

    def _fit(self, index: int, hidden: torch.Tensor, kwargs: dict) -> dict:
        """The layer's keyword arguments for the tokens that are present."""
        if len(self.cuts.stages) > 1:
            if (read := self.located.reads[index]) is not None:
                kwargs = {**kwargs, SHARED_KEYS: self._shared_keys(read, kwargs[SHARED_KEYS])}
            layers = getattr(self.cache, "layers", ())
            return self.arguments.fit(
                layers[index] if index < len(layers) else None,
                hidden,
                kwargs,
                attends=self.located.attentions[index] is not None,
            )
        if self.counts_positions:
            return {**kwargs, "position_embeddings": self.arguments.compacted(hidden)}
        return kwargs

    def _shared_keys(self, layer: int, shared: Any) -> Any:
        """The keys and values that layers keep for later ones, those of `layer` for the tokens present."""
        stage = self.cuts.stage_of(layer)
        if stage is self.cuts.present:
            return shared
        if layer not in self._shared:
            attention: Any = self.located.attentions[layer]
            kept = shared[attention.layer_type]
            place = self.tokens.places_in(stage.tokens)[:, None, :, None].to(kept[0].device)
            present = tuple(
                states.gather(2, place.expand(-1, states.shape[1], -1, states.shape[3]))
                for states in kept
            )
            own = {attention.layer_type: present}
            size = sum(states.nbytes for states in present)
            self._shared[layer] = type(shared)({**shared, **own}), size
        return self._shared[layer][0]

    def _peek(
        self, index: int, needs: Needs, hidden: torch.Tensor, args: tuple, kwargs: dict
    ) -> None:
        """Run layer `index` up to its attention, for methods that look ahead."""
        refuse_unseen_layer(self.located, index, index, needs, ahead=True)
        kwargs = without_cache(self._fit(index, hidden, kwargs))
        attention: Any = self.located.attentions[index]
        apart = has_own_projections(attention)
        rows = self.observer.rows_ahead(needs, self.tokens) if apart else None
        # What was seen of the layer before stays.
        self.observer.needs, self.observer.peeking = needs, True
        self.observer.looked_bytes = 0
        few = few_projections(attention, hidden.shape, self._places(rows))
        try:
            with few if apart else nullcontext():
                self.located.layers[index].forward(hidden, *args[1:], **kwargs)
        except SeenEnough:
            pass
        finally:
            self.observer.peeking = False
        columns, looked = hidden.shape[:2].numel(), self.observer.looked_bytes
        self.ahead.add(index, needs, self.tokens, columns, looked, apart)

    def _places(self, slots: torch.Tensor | slice | None) -> torch.Tensor | slice | None:
        """Places in the sequence, as places in hidden states: others where these are packed."""
        if self.packing is None or slots is None:
            return slots
        return at_slots(self.packing.place[..., None], slots).flatten()[None]

    def _add_deepstack(self, index: int, hidden: torch.Tensor) -> torch.Tensor:
        """Add the features of one level (flat over all visual tokens) to the visual tokens still present.

        The models do this at full length after a layer; here it waits for the next layer's hook.
        """
        if not 0 < index <= len(self.deepstack):
            return hidden
        tokens, features = self.tokens, self.deepstack[index - 1]
        first = np.cumsum([0, *self.layout.num_visual[:-1]])
        row = tokens.index.clamp(min=0) + to_device(first, tokens.index.device)[:, None]
        row = tokens.spread(row, torch.zeros_like(tokens.column)).to(hidden.device)
        original = torch.zeros_like(tokens.column, dtype=torch.bool)
        original = tokens.spread(tokens.index >= 0, original).to(hidden.device)[..., None]
        features = features.to(hidden.device, hidden.dtype)[row]
        if self.packing is not None:
            original, features = self.packing.pack(original), self.packing.pack(features)
        return torch.where(original, hidden + features, hidden)

    def attend(
        self,
        attend: Callable,
        module: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: Any,
        *args: Any,
        **kwargs: Any,
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
        if len(self.cuts.stages) > 1 and counts_positions(module):
            query = at_positions(module, query, self._counted(), self.tokens.some_column)
        self.observer.see(self.tokens, query, key, attention_mask, **kwargs)
        with no_plans if len(self.cuts.stages) > 1 else nullcontext():
            output, weights = attend(module, query, key, value, attention_mask, *args, **kwargs)
        return (output if packing is None else packing.pack(output)), weights

    def _counted(self) -> torch.Tensor:
        """LongTensor [batch or 1, n], what attention counts as the positions of the tokens it is given."""
        if self.packing is not None:
            # In a packed row, prompt behind prompt.
            return self.packing.place
        return torch.arange(self.tokens.width, device=self.tokens.column.device)[None]

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

    def _decide(self, index: int, needs: Needs, hidden: torch.Tensor) -> torch.Tensor:
        """Hidden states after the method was asked about a cut."""
        padded = hidden if self.packing is None or not needs.hidden else self.packing.unpack(hidden)
        seen = self.observer.observation(index, needs, self.tokens, padded)
        return self.cuts.decide(seen, hidden)

    def _may_pack(self) -> bool:
        """Whether ragged batches may be packed into one row."""
        if self.tokens.batch == 1 or self.located.is_hybrid or self.located.shares_keys:
            return False
        has_windows = any(self.located.windows)
        # Something hooked into the layers may count on the batch dimension.
        return can_pack(self.cache, self.implementation, has_windows) and not watches_inputs(
            self.located.layers
        )

    def finish(self, output: Any) -> Any:
        """Put the remaining tokens' states back to their columns and remember the cut on the cache."""
        self._settle()
        if len(self.cuts.stages) == 1 and not self.counts_positions:
            return output
        output["last_hidden_state"] = self.cuts.restore(
            output["last_hidden_state"], self.cuts.present
        )
        if output.get("hidden_states") is not None:
            output["hidden_states"] = tuple(
                states
                if states is None
                else self.cuts.restore(states, self.cuts.stage_of(max(i - 1, 0)))
                for i, states in enumerate(output["hidden_states"])
            )
        if self.cache is not None:
            entering = [
                self.cuts.stage_of(layer).tokens for layer in range(len(self.located.layers))
            ]
            compacted = self.method.positions == "compacted"
            PrunedCache.remember(
                self.cache, entering, self.layout, compacted, self.located, self.implementation
            )
        return output

    def record(self) -> Record:
        """What the trace gets."""
        return Record(
            self.layout,
            self.state,
            self.cuts.stages,
            self.observed,
            self.looked,
            self.sharing,
            self.ahead.flops,
            self.ahead.bytes_taken,
            self.cuts.summaries,
        )
