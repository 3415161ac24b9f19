"""What a cache remembers of prompts that were pruned, and how it travels with the cache.

A layer's class is replaced by one that derives from it, for as long as the layer holds pruned prompts. So
whoever moves rows, resets, copies or stores a cache does it by the layers' own methods, and nothing has to be
watched.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, wraps
from typing import Any

import torch
import transformers
from packaging.version import Version
from transformers.cache_utils import DynamicLayer

from ...errors import UnsupportedError
from ..attention.temperature import counts_positions
from ..locate import Located, Window
from ..tokens.layout import Layout
from ..tokens.present import Tokens
from .columns import MOVES, HeldColumns
from .static import Slots, is_static

# The attribute of a layer that holds its `LayerMemory`, and of a cache that holds its `CacheMemory`.
MEMORY = "_autoprune"

# Until then, a positive number said how many columns a crop leaves.
CROPS_TO_LENGTH = Version(transformers.__version__) < Version("5.18")


@dataclass(eq=False)
class CacheMemory:
    """What stays with a cache when its layers are reset.

    drafts_follow: whether the next forward brings drafts along, in assisted decoding.
    slots: of a static cache that held a pruned prompt.
    """

    drafts_follow: bool = False
    slots: Slots | None = None

    @staticmethod
    def of(cache: Any) -> CacheMemory:
        """That of a cache, which begins with an empty one."""
        return cache.__dict__.setdefault(MEMORY, CacheMemory())


@dataclass(eq=False)
class LayerMemory:
    """What one layer of a cache remembers until it is reset.

    pruned: what all layers have in common.
    number: which of them this is.
    held, stage: its tokens are those of this stage, in rows that are moved as the layer's.
    renumbered: whether new tokens go on with compacted positions, where they are others than the model's own.
    dropped: how many tokens of the prompt its own count lacks, a tensor [] on a static layer. None if none, and
        on all layers that are not asked: the first one is, and those whose attention counts positions.
    expected: whether the next tokens come with a mask and positions for them.
    """

    pruned: PrunedCache
    number: int
    held: HeldColumns
    stage: int
    renumbered: bool
    dropped: int | torch.Tensor | None = None
    expected: bool = False

    @staticmethod
    def of(layer: Any) -> LayerMemory | None:
        return getattr(layer, MEMORY, None)

    @property
    def column(self) -> torch.Tensor:
        """LongTensor [batch, n], the column of the prompt that each token came from; -1 for padding."""
        return self.held.of_stage(self.stage)

    @property
    def width(self) -> int:
        return self.held.widths[self.stage]


@dataclass(eq=False)
class PrunedCache:
    """What all layers of a cache remember in common of the prompts that were cut.

    It lives on the layers, so generations never share it. What differs by prompt is in `HeldColumns`.

    prompt_length: columns of the padded prompt; new tokens get the columns behind it.
    tail: of these columns, how many of the last are text in every prompt.
    compacted: whether new tokens continue each layer's own compacted positions.
    padded: whether a layer's cache holds padding.
    weighed: whether a token in it counts for several.
    slots: what new tokens see of a static cache; None for one that grows.
    backend: the attention that the cache was filled by.
    partly_read: whether a layer that reads the keys of an earlier one sees less than all of them.
    window: the narrowest that a layer sees, in positions; None where all see all.
    readers: of the layers that read the keys of earlier ones, which stage's tokens they see of these.
    has_gaps: whether a later turn hid tokens that came before it, or brought padding of its own.
    """

    prompt_length: int
    tail: int
    compacted: bool
    padded: bool
    weighed: bool
    slots: Slots | None
    backend: str
    partly_read: bool
    window: int | None
    readers: dict[int, int]
    has_gaps: bool = False

    @classmethod
    def remember(
        cls,
        cache: Any,
        entering: Sequence[Tokens],
        layout: Layout,
        compacted: bool,
        located: Located,
        backend: str,
    ) -> None:
        """Let the layers of a cache remember what a prefill left in them.

        Args:
            entering: the tokens that entered each layer; the same object where there was no cut between.
            compacted: whether the method compacts positions.
            backend: the attention that the cache was filled by.
        """
        entering = _as_held(entering, located.reads)
        own: list[Tokens] = list(dict.fromkeys(entering))
        stages = [own.index(tokens) for tokens in entering]
        held = [tokens.without_last(layout.drafts) for tokens in own]
        windows = [window for window in located.windows if window is not None]
        chunked = any(window.chunked for window in windows)
        columns = HeldColumns.of(held, entering[0].prompts.first if chunked else None)
        # Positions are counted by the first layer that holds tokens; others hold a state.
        first = next(n for n, layer in enumerate(cache.layers) if hasattr(layer, "update"))
        dropped = layout.length - held[stages[first]].width
        slots = None
        if is_static(cache.layers[0]):
            kept, by_layer = CacheMemory.of(cache), [held[stage] for stage in stages]
            slots = kept.slots = Slots.of(cache.layers, by_layer, layout.length, kept.slots)
        padded = any(tokens.padded for tokens in held)
        weighed = columns.bias is not None
        readers = {n: stages[n] for n, read in enumerate(located.reads) if read is not None}
        pruned = cls(
            prompt_length=layout.length,
            tail=layout.tail,
            compacted=compacted,
            padded=padded,
            weighed=weighed,
            slots=slots,
            backend=backend,
            partly_read=any(
                stages[n] != stages[read]
                for n, read in enumerate(located.reads)
                if read is not None
            ),
            window=min((window.size for window in windows), default=None),
            readers=readers,
        )
        for number, (layer, stage) in enumerate(zip(cache.layers, stages, strict=False)):
            renumbered = compacted and held[stage].renumbered
            memory = LayerMemory(pruned, number, columns, stage, renumbered)
            if number == first and dropped:
                memory.dropped = dropped if slots is None else slots.dropped
            elif counts_positions(located.attentions[number]):
                memory.dropped = layout.length - held[stage].width
            base: type = type(layer)
            layer.__class__ = _pruned_class(base)
            setattr(layer, MEMORY, memory)

    @staticmethod
    def of(cache: Any) -> PrunedCache | None:
        layers = getattr(cache, "layers", ())
        memory = LayerMemory.of(layers[0]) if layers else None
        return None if memory is None else memory.pruned

    def sees_all(self, windows: Sequence[Window | None]) -> bool:
        """Whether a new token sees all that is there at the model's own positions, and needs no mask."""
        special = self.padded or self.weighed or self.has_gaps or self.compacted
        return not (special or any(windows))

    def refuse_plain_model(self, new: int, before: int) -> None:
        """Raise UnsupportedError if the model without hooks cannot go on with so many new tokens.

        Args:
            before: new tokens that are in the cache already.
        """
        if self.slots is not None:
            reason = "the slots of its layers do not hold the columns of the prompt any more"
        elif self.partly_read:
            reason = "some layers see less of the keys of an earlier layer than this still holds"
        elif self.padded:
            reason = "its prompts have different lengths in it, which only pruning makes masks for"
        elif self.compacted:
            reason = "its positions were numbered anew, which only pruning goes on with"
        elif self.weighed:
            reason = "a token in it counts for several, which only pruning makes masks for"
        elif self.window is not None and self.prompt_length + before + new >= self.window:
            reason = f"a window of {self.window} positions would be counted in kept tokens"
        elif new > 1 and "flash" not in self.backend:
            reason = "several new tokens at once need masks of each layer's own"
        else:
            return
        raise UnsupportedError(
            f"this cache was pruned, and {reason}; go on in the context that pruned it, or before its handle "
            "is detached"
        )

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
        shorter: dict[HeldColumns, HeldColumns] = {}
        for memory in filter(None, map(LayerMemory.of, cache.layers)):
            if memory.held not in shorter:
                shorter[memory.held] = memory.held.without_last(columns)
            memory.held = shorter[memory.held]
        self.prompt_length, self.tail = self.prompt_length - columns, self.tail - columns

    def note_hidden(self, cache: Any, valid: torch.Tensor) -> None:
        """Note whether the caller's mask, bool [batch, columns so far], hides any that is held or given.

        A static cache is told what it hides.
        """
        memories = [memory for layer in cache.layers if (memory := LayerMemory.of(layer))]
        column, new = memories[0].column, valid[:, self.prompt_length :]
        if not self.has_gaps:
            shown = valid.gather(1, column.clamp(min=0)) | (column < 0)
            self.has_gaps = not bool(shown.all() & new.all())
        if self.has_gaps and self.slots is not None:
            for memory in memories:
                shown = valid.gather(1, memory.column.clamp(min=0)) & (memory.column >= 0)
                shown = torch.cat([shown, new], dim=1)
                self.slots.show(memory.number, shown, memory.width)

    @staticmethod
    def forget(cache: Any) -> None:
        """Before a new prefill: a cache may be used again after a reset."""
        for layer in getattr(cache, "layers", ()):
            _forget(layer)
        if (memory := getattr(cache, MEMORY, None)) is not None:
            memory.drafts_follow = False


def refuse_moved_rows(cache: Any, batch: int) -> None:
    """A pruned cache whose rows were joined, taken or replaced by other means than its own methods."""
    for memory in map(LayerMemory.of, cache.layers):
        if memory is None or len(memory.held) != batch:
            remembered = "nothing" if memory is None else f"{len(memory.held)} rows"
            raise UnsupportedError(
                f"{batch} rows go on with a pruned cache of which a layer remembers {remembered}; move "
                "its rows by reorder_cache, batch_select_indices or batch_repeat_interleave, or run the "
                "prompts anew"
            )


def _as_held(entering: Sequence[Tokens], reads: Sequence[int | None]) -> list[Tokens]:
    """The tokens that each layer sees of what is cached, which may be the cache of an earlier layer."""
    held: list[Tokens] = []
    views: dict[tuple[Tokens, Tokens], Tokens] = {}
    for tokens, read in zip(entering, reads, strict=True):
        if read is None:
            held.append(tokens)
            continue
        pair = entering[read], tokens
        if pair not in views:
            views[pair] = entering[read].only(tokens)
        held.append(views[pair])
    return held


def refuse_lost_memory(cache: Any, batch: int) -> None:
    """A batch on a cache that was made anew from the keys of a pruned one, without what it remembered."""
    if batch == 1:
        return
    plain = (
        layer for layer in cache.layers if type(layer) is DynamicLayer and layer.is_initialized
    )
    if len({layer.get_seq_length() for layer in plain}) > 1:
        raise UnsupportedError(
            "the layers of this cache differ in length, as a pruned one's do, but nothing is remembered of "
            "where its prompts are padded; go on with the cache itself, or a copy by copy.deepcopy"
        )


@cache
def _pruned_class(base: type) -> type:
    """The class of layers of class `base` while they hold pruned prompts."""

    class Pruned(base):
        # The class behind it is known to transformers by its type, if it has one.
        _layer_type = None

        def update(self, key_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            memory = getattr(self, MEMORY)
            if not memory.expected:
                static = memory.pruned.slots is not None
                before = 0 if static else super().get_seq_length() - memory.width
                memory.pruned.refuse_plain_model(key_states.shape[-2], before)
            memory.expected = False
            return super().update(key_states, *args, **kwargs)

        def get_seq_length(self) -> Any:
            """That of the whole prompt where layer 0 was cut: positions of new tokens are counted from it."""
            length, dropped = super().get_seq_length(), getattr(self, MEMORY).dropped
            return length if dropped is None else length + dropped

        def crop(self, tokens_to_remove: int) -> None:
            if tokens_to_remove > 0 and CROPS_TO_LENGTH and not self.is_sliding:
                # The layer has fewer tokens than the conversation has columns.
                memory = getattr(self, MEMORY)
                columns = memory.pruned.prompt_length - memory.width + super().get_seq_length()
                tokens_to_remove = min(tokens_to_remove - columns, 0)
            super().crop(tokens_to_remove)

        def reset(self) -> None:
            _forget(self)
            self.reset()

        def __reduce__(self) -> tuple:
            return _blank, (base,), self.__dict__

    Pruned.__name__ = Pruned.__qualname__ = f"Pruned{base.__name__}"
    for name in MOVES:
        if move := getattr(base, name, None):
            setattr(Pruned, name, _with_memory(name, move))
    return Pruned


def _blank(base: type) -> Any:
    """A layer without anything, for copies and pickles."""
    layer_class: Any = _pruned_class(base)
    return layer_class.__new__(layer_class)


def _with_memory(name: str, move: Callable) -> Callable:
    """A layer's method that moves rows, and moves what the layer remembers of them, too."""

    @wraps(move)
    def moved(layer: Any, argument: Any) -> None:
        move(layer, argument)
        memory = getattr(layer, MEMORY)
        memory.held = memory.held.moved(name, argument)
        pruned = memory.pruned
        # Rows that hold their tokens in the same places show the same slots.
        if pruned.slots is not None and (pruned.padded or pruned.has_gaps or pruned.weighed):
            pruned.slots.move(memory.number, name, argument)

    return moved


def _forget(layer: Any) -> None:
    """Let a layer forget; harmless if it remembers nothing."""
    if layer.__dict__.pop(MEMORY, None) is not None:
        layer.__class__ = type(layer).__bases__[0]
