"""The tokens that are present at one depth of the decoder, and what a cut leaves of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch

from ..method import Merged, Selection
from ..transfer import all_to_device, to_device
from .layout import Layout

MERGED = -2


@dataclass(eq=False)
class Tokens:
    """The tokens present at one depth, padded on the left to a common length n.

    column: LongTensor [batch, n], the column of the prompt each token came from; -1 for padding.
    index: LongTensor [batch, V], 0..N-1 of an original visual token, MERGED, or -1 for padding.
    order: LongTensor [n], 0, 1, ...
    lengths, counts: real tokens and visual tokens of each prompt (host).
    heads: how many tokens of each prompt stand before its visual ones, if those are in one piece in all
        prompts (host). Where every token is follows from these numbers then, if padding is on the left.
    places: `text` and `slots` where it does not follow.
    was_cut: whether this is what a cut left; the prompt itself may be padded on the right.
    """

    column: torch.Tensor
    index: torch.Tensor
    order: torch.Tensor
    lengths: list[int]
    counts: list[int]
    heads: list[int] | None = None
    places: tuple[torch.Tensor, torch.Tensor] | None = None
    was_cut: bool = False

    @classmethod
    def of(cls, layout: Layout, device: torch.device) -> Tokens:
        real, visual = layout.real, layout.visual
        columns, counts, heads = np.arange(real.shape[1]), layout.num_visual, _heads(layout)
        slots, places = _places(visual), None
        if heads is None or not (real[:, 1:] >= real[:, :-1]).all():
            text = np.sort(_places(real & ~visual), axis=1)
            places = to_device(text, device), to_device(np.maximum(slots, 0), device)
        return cls(
            to_device(np.where(real, columns, -1), device),
            to_device(np.where(slots >= 0, np.arange(max(counts)), -1), device),
            torch.arange(len(columns), device=device),
            lengths=real.sum(axis=1).tolist(),
            counts=counts,
            heads=heads,
            places=places,
        )

    def without_last(self, drafts: int) -> Tokens:
        """Without the last columns, which are text."""
        if not drafts:
            return self
        width, places = self.width - drafts, self.places
        if places is not None:
            text, slots = places
            places = text[:, : text.shape[1] - drafts], slots
        return replace(
            self,
            column=self.column[:, :width],
            order=self.order[:width],
            lengths=[n - drafts for n in self.lengths],
            places=places,
        )

    @property
    def width(self) -> int:
        return self.column.shape[1]

    @property
    def padded(self) -> bool:
        """Whether any prompt is shorter than n."""
        return min(self.lengths) < self.width

    @property
    def ragged(self) -> bool:
        """Whether prompts differ in their number of visual tokens."""
        return min(self.counts) < max(self.counts)

    @cached_property
    def block(self) -> slice | None:
        """Where the visual tokens are, if they are in one piece and at the same place in all prompts."""
        heads = self.heads
        if heads is None or self.padded or self.ragged or min(heads) < max(heads):
            return None
        return slice(heads[0], heads[0] + self.counts[0])

    @cached_property
    def some_column(self) -> torch.Tensor:
        """`column`, with any in the place of padding."""
        return self.column.clamp(min=0) if self.padded else self.column

    @cached_property
    def text(self) -> torch.Tensor:
        """LongTensor [batch, T], places of the other tokens, ascending; negative for padding."""
        if self.places is not None:
            return self.places[0]
        heads, lengths, counts = self._geometry
        number = lengths - counts
        rank = np.arange(number.max()) - (number.max() - number)
        place = self.width - lengths + rank + np.where(rank < heads, 0, counts)
        return to_device(np.where(rank >= 0, place, -1), self.column.device)

    @cached_property
    def slots(self) -> torch.Tensor:
        """LongTensor [batch, V], places of the visual tokens, ascending; those beyond a prompt's count are
        padding and point anywhere.
        """
        if self.places is not None:
            return self.places[1]
        if self.block is not None:
            return self.order[self.block].expand(len(self.column), -1)
        return self._arrangement[0]

    @property
    def _geometry(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Heads, lengths and counts, each [batch, 1]."""
        assert self.heads is not None
        return tuple(np.array(n)[:, None] for n in (self.heads, self.lengths, self.counts))  # type: ignore

    @cached_property
    def slot_mask(self) -> torch.Tensor:
        """bool [batch, V], False beyond a prompt's own count."""
        if not self.ragged:
            return torch.ones_like(self.index, dtype=torch.bool)
        return self._arrangement[1]

    @property
    def first_seen(self) -> torch.Tensor:
        """LongTensor [batch, n], the first place that a token sees; padding, on the left, sees itself."""
        return self._arrangement[2]

    @property
    def packed(self) -> tuple[torch.Tensor, torch.Tensor]:
        """All prompts' real tokens in one row: LongTensor [batch, n], the place of each token there (any for
        padding), and LongTensor [total], the places of the row's tokens among the batch * n padded ones.
        """
        return self._arrangement[3], self._arrangement[4]

    @cached_property
    def _arrangement(self) -> list[torch.Tensor]:
        """What follows from the numbers of tokens on the host, for prompts padded on the left."""
        width, lengths = self.width, np.array(self.lengths)[:, None]
        counts, rank = np.array(self.counts)[:, None], np.arange(max(self.counts))
        place = np.arange(width)
        real = place >= width - lengths
        heads = 0 if self.heads is None else np.array(self.heads)[:, None]
        arrays = [
            np.clip(width - lengths + heads + rank, 0, max(width - 1, 0)),
            rank < counts,
            np.minimum(place, width - lengths),
            np.maximum(real.cumsum().reshape(real.shape) - 1, 0),
            np.flatnonzero(real),
        ]
        return all_to_device(arrays, self.column.device)

    @property
    def waste(self) -> float:
        """Padding as a share of the real tokens."""
        return len(self.lengths) * self.width / max(sum(self.lengths), 1) - 1

    def spread(self, values: torch.Tensor, default: torch.Tensor) -> torch.Tensor:
        """`default` [batch, n], with `values` [batch, V] in the visual tokens' places."""
        if self.ragged:
            # A column more takes what padding holds.
            spare = self.slots.masked_fill(~self.slot_mask, self.width)
            default = torch.nn.functional.pad(default, (0, 1))
            return default.scatter(1, spare, values)[:, : self.width]
        return default.scatter(1, self.slots, values)

    def after(self, selection: Selection) -> tuple[Tokens, torch.Tensor]:
        """The tokens after a cut, and where each comes from.

        Returns:
            The new tokens, and LongTensor [batch, n'] of sources: places in this sequence, or
            width + i for merged token i. Sources of padding point anywhere.
        """
        counts = list(selection.counts)
        kept = selection.kept[:, : max(counts)]
        if selection.merged is None and self.places is None:
            if self.block is not None and min(counts) == max(counts):
                return self._after_in_block(kept, counts)
            return self._after_in_pieces(kept, counts)
        if min(counts) < max(counts):
            mask = kept >= 0
            kept = kept.clamp(min=0)
            visual = self.slots.gather(1, kept).where(mask, -1)
            index = self.index.gather(1, kept).where(mask, -1)
        else:
            visual, index = self.slots.gather(1, kept), self.index.gather(1, kept)
        # Each token's place is its key: sorting puts padding in front and the rest in order.
        keys, sources, column = torch.cat([self.text, visual], dim=1), None, self.column
        if (merged := selection.merged) is not None:
            counts = [a + b for a, b in zip(counts, merged.counts, strict=True)]
            keys, sources, index, column = self._with_merged(merged, max(counts), visual, index)
        lengths = [
            n - old + new for n, old, new in zip(self.lengths, self.counts, counts, strict=True)
        ]
        width = max(lengths)
        padded, surplus = min(lengths) < width, keys.shape[1] - width
        source, ranked = keys.sort(dim=1, stable=True)
        # Where each went: the inverse of the ranking.
        order = torch.arange(keys.shape[1], device=keys.device)
        went = torch.empty_like(ranked).scatter_(1, ranked, order.expand_as(ranked))
        if sources is not None:
            source = sources.gather(1, ranked)
        if surplus:
            source, went = source[:, surplus:], went - surplus
        text, slots = went.split([went.shape[1] - index.shape[1], index.shape[1]], dim=1)
        if padded:
            real = source >= 0
            source = source.clamp(min=0)
            column = column.gather(1, source).where(real, -1)
            text = text.where(self.text >= 0, -1)
        else:
            column = column.gather(1, source)
        heads, places = self.heads, None
        if heads is None:
            places = text, slots.clamp(min=0) if min(counts) < max(counts) else slots
        order = order[:width]
        return Tokens(column, index, order, lengths, counts, heads, places, was_cut=True), source

    def _after_in_block(self, kept: torch.Tensor, counts: list[int]) -> tuple[Tokens, torch.Tensor]:
        """`after`, where only places of one block are dropped, equally many in all prompts."""
        assert self.block is not None
        batch, start, stop = len(self.column), self.block.start, self.block.stop
        head, tail = self.order[:start].expand(batch, -1), self.order[stop:].expand(batch, -1)
        source = torch.cat([head, kept + start, tail], dim=1)
        dropped = self.counts[0] - counts[0]
        new = Tokens(
            column=self.column.gather(1, source),
            index=self.index.gather(1, kept),
            order=self.order[: source.shape[1]],
            lengths=[n - dropped for n in self.lengths],
            counts=counts,
            heads=self.heads,
            was_cut=True,
        )
        return new, source

    def _after_in_pieces(
        self, kept: torch.Tensor, counts: list[int]
    ) -> tuple[Tokens, torch.Tensor]:
        """`after`, where the visual tokens of every prompt are in one piece and nothing is merged.

        All but the kept places is known on the host.
        """
        heads, lengths, old = self._geometry
        number, device = np.array(counts)[:, None], self.column.device
        left = lengths - old + number
        width = int(left.max())
        place = np.arange(width) - (width - left)
        rank = place - heads
        visual = (rank >= 0) & (rank < number)
        # Of a visual token, where its piece begins: the kept place is added to it.
        before = np.where(visual, heads, place + np.where(rank < 0, 0, old - number))
        before = np.where(place < 0, 0, before + self.width - lengths)
        rows = np.flatnonzero(visual)
        chosen = (rank + kept.shape[1] * np.arange(len(old))[:, None])[visual]
        arrays = [before.ravel(), rows, chosen, place < 0]
        source, rows, chosen, padding = all_to_device(arrays, device)
        source.index_add_(0, rows, kept.flatten().index_select(0, chosen))
        source = source.view(padding.shape)
        column = self.column.gather(1, source)
        if left.min() < width:
            column = column.masked_fill(padding, -1)
        new = Tokens(
            column=column,
            index=self.index.gather(1, kept.clamp(min=0)),
            order=self.order[:width],
            lengths=left[:, 0].tolist(),
            counts=counts,
            heads=self.heads,
            was_cut=True,
        )
        if new.ragged:
            new.index = new.index.masked_fill(~new.slot_mask, -1)
        return new, source

    def _with_merged(self, merged: Merged, most: int, visual, index):
        """Sort keys, sources, visual index and columns once merged tokens join the kept ones.

        Keys are twice the places: the odd ones are for merged tokens that go between two tokens.
        """
        slots, device = self.slots, self.slots.device
        number = merged.hidden.shape[1]
        real = length_mask(merged.counts, number, device)
        if merged.place is None:
            last = to_device([max(n - 1, 0) for n in self.counts], device)
            slot, behind = slots.gather(1, last[:, None]).expand(-1, number), 1
        else:
            slot, behind = slots.gather(1, merged.place.clamp(min=0)), 0
        extra = torch.arange(self.width, self.width + number, device=device).expand_as(slot)
        # Kept and merged tokens in their order, padding last.
        key = torch.cat([visual * 2, (slot * 2 + behind).where(real, -1)], dim=1)
        order = key.where(key >= 0, 2 * self.width + 2).argsort(dim=1, stable=True)[:, :most]
        key = key.gather(1, order)
        joined = torch.cat([index, torch.full_like(slot, MERGED).where(real, -1)], dim=1)
        source = torch.cat([visual, extra], dim=1).gather(1, order).where(key >= 0, -1)
        return (
            torch.cat([self.text * 2, key], dim=1),
            torch.cat([self.text, source], dim=1),
            joined.gather(1, order),
            torch.cat([self.column, self.column.gather(1, slot)], dim=1),
        )


def _places(chosen: np.ndarray) -> np.ndarray:
    """Columns of the True entries of bool [batch, S], ascending, then -1; [batch, most of them]."""
    counts = chosen.sum(axis=1)
    order = np.argsort(~chosen, axis=1, kind="stable")[:, : counts.max()]
    return np.where(np.arange(order.shape[1]) < counts[:, None], order, -1)


def _heads(layout: Layout) -> list[int] | None:
    """Tokens of each prompt before its visual ones; None if those of a prompt are not in one piece."""
    heads = []
    for real, visual in zip(layout.real, layout.visual, strict=True):
        (seen,) = np.nonzero(visual[real])
        if seen.size and seen[-1] - seen[0] + 1 > seen.size:
            return None
        heads.append(int(seen[0]) if seen.size else 0)
    return heads


def length_mask(lengths: Sequence[int], width: int, device: torch.device) -> torch.Tensor:
    """bool [batch, width]: the first `lengths[b]` entries of row b."""
    limit = to_device(list(lengths), device)
    return torch.arange(width, device=device) < limit[:, None]
