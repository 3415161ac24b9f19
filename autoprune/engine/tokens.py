"""The tokens that are present at one depth of the decoder, and what a cut leaves of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch

from ..method import Merged, Selection
from ..transfer import to_device
from .layout import Layout

MERGED = -2


@dataclass(eq=False)
class Tokens:
    """The tokens present at one depth, padded on the left to a common length n.

    column: LongTensor [batch, n], the column of the prompt each token came from; -1 for padding.
    text: LongTensor [batch, T], places of the other tokens in the sequence, ascending; negative for padding.
    slots: LongTensor [batch, V], places of the visual tokens, ascending. Entries beyond a prompt's count
        are padding and point anywhere.
    index: LongTensor [batch, V], 0..N-1 of an original visual token, MERGED, or -1 for padding.
    lengths, counts: real tokens and visual tokens of each prompt (host).
    padded: whether any prompt is shorter than n.
    block: where the visual tokens are, if they are in one piece and at the same place in all prompts.
    was_cut: whether this is what a cut left; the prompt itself may be padded on the right.
    """

    column: torch.Tensor
    text: torch.Tensor
    slots: torch.Tensor
    index: torch.Tensor
    lengths: list[int]
    counts: list[int]
    padded: bool
    block: slice | None = None
    was_cut: bool = False

    @classmethod
    def of(cls, layout: Layout, device: torch.device) -> Tokens:
        real, visual = layout.real, layout.visual
        columns, counts = np.arange(real.shape[1]), layout.num_visual
        slots = _places(visual)
        parts = (
            np.where(real, columns, -1),
            np.sort(_places(real & ~visual), axis=1),
            np.maximum(slots, 0),
            np.where(slots >= 0, np.arange(max(counts)), -1),
        )
        return cls(
            *(to_device(part, device) for part in parts),
            lengths=real.sum(axis=1).tolist(),
            counts=counts,
            padded=not real.all(),
            block=_block(slots) if real.all() else None,
        )

    def without_last(self, drafts: int) -> Tokens:
        """Without the last columns, which are text."""
        if not drafts:
            return self
        return replace(
            self,
            column=self.column[:, : self.width - drafts],
            text=self.text[:, : self.text.shape[1] - drafts],
            lengths=[n - drafts for n in self.lengths],
        )

    @property
    def width(self) -> int:
        return self.column.shape[1]

    @cached_property
    def some_column(self) -> torch.Tensor:
        """`column`, with any in the place of padding."""
        return self.column.clamp(min=0) if self.padded else self.column

    @cached_property
    def slot_mask(self) -> torch.Tensor:
        """bool [batch, V], False beyond a prompt's own count."""
        if min(self.counts) == max(self.counts):
            return torch.ones_like(self.slots, dtype=torch.bool)
        return length_mask(self.counts, max(self.counts), self.column.device)

    @property
    def waste(self) -> float:
        """Padding as a share of the real tokens."""
        return len(self.lengths) * self.width / max(sum(self.lengths), 1) - 1

    def spread(self, values: torch.Tensor, default: torch.Tensor) -> torch.Tensor:
        """`default` [batch, n], with `values` [batch, V] in the visual tokens' places."""
        if min(self.counts) < max(self.counts):
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
        if self.block is not None and selection.merged is None and min(counts) == max(counts):
            return self._after_in_block(kept, counts)
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
        source, order = keys.sort(dim=1, stable=True)
        # Where each went: the inverse of the order.
        count = torch.arange(keys.shape[1], device=keys.device).expand_as(order)
        places = torch.empty_like(order).scatter_(1, order, count)
        if sources is not None:
            source = sources.gather(1, order)
        if surplus:
            source, places = source[:, surplus:], places - surplus
        text, slots = places.split([self.text.shape[1], index.shape[1]], dim=1)
        if padded:
            real = source >= 0
            source = source.clamp(min=0)
            column = column.gather(1, source).where(real, -1)
            text = text.where(self.text >= 0, -1)
        else:
            column = column.gather(1, source)
        if min(counts) < max(counts):
            slots = slots.clamp(min=0)
        block = None
        if self.block is not None and not padded:
            # What stands before it stays.
            block = slice(self.block.start, self.block.start + counts[0])
        new = Tokens(column, text, slots, index, lengths, counts, padded, block, was_cut=True)
        return new, source

    def _after_in_block(self, kept: torch.Tensor, counts: list[int]) -> tuple[Tokens, torch.Tensor]:
        """`after`, where only places of one block are dropped, equally many in all prompts."""
        assert self.block is not None
        (batch, width), start, stop = self.column.shape, self.block.start, self.block.stop
        order = torch.arange(width, device=kept.device)
        head, tail = order[:start].expand(batch, -1), order[stop:].expand(batch, -1)
        source = torch.cat([head, kept + start, tail], dim=1)
        left = counts[0]
        dropped = self.counts[0] - left
        block = slice(start, start + left)
        text = torch.cat([order[:start], order[block.stop : width - dropped]]).expand(batch, -1)
        new = Tokens(
            column=self.column.gather(1, source),
            text=text,
            slots=order[block].expand(batch, -1),
            index=self.index.gather(1, kept),
            lengths=[n - dropped for n in self.lengths],
            counts=counts,
            padded=False,
            block=block,
            was_cut=True,
        )
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


def _block(slots: np.ndarray) -> slice | None:
    """The one slice that holds the same consecutive columns in all rows of [batch, V], if there is one."""
    wanted = slots[0, 0] + np.arange(slots.shape[1]) if slots.size else slots
    if not slots.size or (slots != wanted).any():
        return None
    return slice(int(wanted[0]), int(wanted[-1]) + 1)


def length_mask(lengths: Sequence[int], width: int, device: torch.device) -> torch.Tensor:
    """bool [batch, width]: the first `lengths[b]` entries of row b."""
    limit = to_device(list(lengths), device)
    return torch.arange(width, device=device) < limit[:, None]
