"""The tokens that are present at one depth of the decoder, and where they are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch

from ...errors import UnsupportedError
from ...parts.transfer import to_device
from .layout import Layout

NEW = -2
"""The index of a token that was made from dropped ones."""


def blocked_by_half(dtype: torch.dtype) -> float:
    """What blocks a token in an additive mask. Two of these are still finite, so that padding, which sees
    nothing, has some weights.
    """
    return torch.finfo(dtype).min / 2


NEVER = 2**40
"""The rank of a token that no cut keeps."""


class OnDevice:
    """What is known of the prompts of a prefill, as tensors that all depths share."""

    def __init__(self, layout: Layout, device: torch.device):
        self.layout, self.device = layout, device
        self.batch, self.columns = layout.real.shape
        seen = np.flatnonzero(layout.visual[0])
        start, stop = (int(seen[0]), int(seen[-1]) + 1) if seen.size else (0, 0)
        same_place = bool((layout.visual == layout.visual[:1]).all() and layout.real.all())
        # The columns of the visual tokens, where they are one block at the same place in all prompts.
        self.block = slice(start, stop) if same_place and stop - start == seen.size else None

    @cached_property
    def ascending(self) -> torch.Tensor:
        """LongTensor [S]: 0, 1, ..."""
        return torch.arange(self.columns, device=self.device)

    @cached_property
    def first(self) -> torch.Tensor:
        """LongTensor [batch]: the column of each prompt's first token."""
        return to_device(self.layout.real.argmax(axis=1), self.device)

    @cached_property
    def kept_always(self) -> torch.Tensor:
        """LongTensor [batch, S], the rank of text: -1."""
        return torch.full((self.batch, self.columns), -1, device=self.device)

    @cached_property
    def all_true(self) -> torch.Tensor:
        """bool [batch, S]."""
        return torch.ones(self.batch, self.columns, dtype=torch.bool, device=self.device)

    @cached_property
    def visual_index(self) -> torch.Tensor:
        """LongTensor [batch, S]: which of the prompt's visual tokens a column holds; -1 for others."""
        visual = self.layout.visual
        return to_device(np.where(visual, visual.cumsum(axis=1) - 1, -1), self.device)

    @cached_property
    def column(self) -> torch.Tensor:
        """LongTensor [batch, S]: each token's column, which is its place; -1 for padding."""
        if self.layout.real.all():
            return self.ascending[None].expand(self.batch, -1)
        columns = np.where(self.layout.real, np.arange(self.columns), -1)
        return to_device(columns, self.device)


@dataclass(eq=False)
class Tokens:
    """The tokens present at one depth, n of each prompt; a cut pads them on the left.

    prompts: what all depths share.
    lengths, counts: real tokens and visual tokens of each prompt (host).
    column: LongTensor [batch, n], the column of the prompt each token came from; -1 for padding.
    heads: how many tokens of each prompt stand before its visual ones, if those are in one piece in all
        prompts (host).
    was_cut: whether this is what a cut left; the prompt itself may be padded on the right.
    index_with_new: LongTensor [batch, n], where cuts made new tokens, which have the columns of others: `index`
        of visual tokens, -1 for all others.
    number, first_slot: LongTensor [batch], `counts`, and the places of the first visual tokens where they are
        in one piece; planned_padding_mask: `padding_mask`. Known where they were planned with other depths.
    bias: float32 [batch, n], what is added to every score of attention on a token: the logarithm of how many
        tokens it counts for. None where each counts for itself.
    """

    prompts: OnDevice
    lengths: list[int]
    counts: list[int]
    column: torch.Tensor
    heads: list[int] | None = None
    was_cut: bool = False
    index_with_new: torch.Tensor | None = None
    number: torch.Tensor | None = None
    first_slot: torch.Tensor | None = None
    planned_padding_mask: Callable[[torch.dtype], torch.Tensor] | None = None
    bias: torch.Tensor | None = None

    @classmethod
    def of(cls, layout: Layout, device: torch.device) -> Tokens:
        prompts = OnDevice(layout, device)
        lengths = layout.real.sum(axis=1).tolist()
        return cls(prompts, lengths, layout.num_visual, prompts.column, _heads(layout))

    def without_last(self, columns: int) -> Tokens:
        """Without the last columns, which are text."""
        if not columns:
            return self
        lengths = [n - columns for n in self.lengths]
        return replace(
            self,
            planned_padding_mask=None,
            column=self.column[:, : self.width - columns],
            lengths=lengths,
            bias=None if self.bias is None else self.bias[:, : self.width - columns],
        )

    @property
    def batch(self) -> int:
        return len(self.lengths)

    @property
    def width(self) -> int:
        return self.column.shape[1]

    @property
    def padded(self) -> bool:
        """Whether any prompt is shorter than n."""
        return min(self.lengths) < self.width

    @property
    def renumbered(self) -> bool:
        """Whether compacted positions are others than the model's own."""
        return self.was_cut or self.padded

    @property
    def has_new(self) -> bool:
        """Whether a cut made new tokens; two may have one column then."""
        return self.index_with_new is not None

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
    def is_visual(self) -> torch.Tensor:
        """bool [batch, n]."""
        if self.index_with_new is not None:
            return self.index_with_new != -1
        visual = self.prompts.visual_index.gather(1, self.some_column) >= 0
        return visual & (self.column >= 0) if self.padded else visual

    @cached_property
    def slots(self) -> torch.Tensor:
        """LongTensor [batch, V], places of the visual tokens, ascending; those beyond a prompt's count are
        padding and point anywhere.
        """
        if self.block is not None:
            return self.prompts.ascending[self.block].expand(self.batch, -1)
        if self.first_slot is not None:
            slots = self.first_slot[:, None] + self.prompts.ascending[: max(self.counts)]
            return slots.clamp_(max=self.width - 1)
        return self._places(self.is_visual, max(self.counts))

    @cached_property
    def text(self) -> torch.Tensor:
        """LongTensor [batch, T], places of the other tokens, ascending; then -1 as padding."""
        number = [n - visual for n, visual in zip(self.lengths, self.counts, strict=True)]
        places = self._places((self.column >= 0) & ~self.is_visual, max(number))
        return places.where(length_mask(number, max(number), places.device), -1)

    @cached_property
    def last_slot(self) -> torch.Tensor:
        """LongTensor [batch or 1, 1], the place of each prompt's last token."""
        if self.was_cut or not self.padded:
            return self.prompts.ascending[self.width - 1][None, None]
        place = self.prompts.ascending[: self.width].where(self.column >= 0, -1)
        return place.amax(dim=1, keepdim=True)

    def places_in(self, before: Tokens) -> torch.Tensor:
        """LongTensor [batch, n]: where each token stood among those of an earlier depth; 0 for padding.

        Raises:
            UnsupportedError: a cut between them made new tokens, which stood nowhere.
        """
        if self.has_new:
            raise UnsupportedError(
                "some layers of this decoder read the keys and values of earlier ones, which have none for "
                "tokens that a later cut made of others; use a method that merges before the decoder only, or "
                "not at all"
            )
        # A column more takes padding.
        end = self.prompts.columns
        place = torch.zeros(self.batch, end + 1, dtype=torch.long, device=self.column.device)
        column = before.column.where(before.column >= 0, end) if before.padded else before.column
        place.scatter_(1, column, self.prompts.ascending[: before.width].expand_as(column))
        return place.gather(1, self.some_column)

    def only(self, left: Tokens) -> Tokens:
        """These tokens, with padding in the place of those that later cuts have dropped."""
        if left is self:
            return self
        place, real = left.places_in(self), left.column >= 0
        none = torch.full_like(self.column, -1)
        bias = None
        if left.bias is not None:
            zeros = torch.zeros(self.column.shape, device=self.column.device)
            bias = self._put(zeros, place, real, left.bias)
        return replace(
            self,
            planned_padding_mask=None,
            column=self._put(none, place, real, left.column),
            lengths=left.lengths,
            counts=left.counts,
            bias=bias,
        )

    def _places(self, chosen: torch.Tensor, most: int) -> torch.Tensor:
        """Places of the True entries of bool [batch, n], at most so many, ascending; then 0."""
        # One place more takes what is not chosen.
        rank = (chosen.cumsum(dim=1) - 1).where(chosen, most)
        places = rank.new_zeros(self.batch, most + 1)
        every = torch.arange(self.width, device=places.device).expand_as(rank)
        return places.scatter_(1, rank, every)[:, :most]

    @cached_property
    def slot_mask(self) -> torch.Tensor:
        """bool [batch, V], False beyond a prompt's own count."""
        most = max(self.counts)
        if not self.ragged:
            return self.prompts.all_true[:, :most]
        number = self.is_visual.sum(dim=1) if self.number is None else self.number
        return self.prompts.ascending[:most] < number[:, None]

    @cached_property
    def index(self) -> torch.Tensor:
        """LongTensor [batch, V], 0..N-1 of an original visual token, NEW, or -1 for padding."""
        if self.index_with_new is not None:
            index = self.index_with_new.gather(1, self.slots)
            return index.where(self.slot_mask, -1) if self.ragged else index
        if self.block is not None and self.prompts.block is not None:
            return self.column[:, self.block] - self.prompts.block.start
        if self.prompts.block is not None:
            index = self.column.gather(1, self.slots) - self.prompts.block.start
        else:
            index = self.prompts.visual_index.gather(1, self.some_column.gather(1, self.slots))
        return index.where(self.slot_mask, -1) if self.ragged else index

    def padding_mask(self, dtype: torch.dtype) -> torch.Tensor:
        """Additive mask [batch, n] that blocks padding, by half of what a type of numbers holds."""
        if self.planned_padding_mask is not None:
            return self.planned_padding_mask(dtype)
        mask = torch.zeros_like(self.column, dtype=dtype)
        return mask.masked_fill_(self.column < 0, blocked_by_half(dtype))

    @property
    def waste(self) -> float:
        """Padding as a share of the real tokens."""
        return self.batch * self.width / max(sum(self.lengths), 1) - 1

    def ranks(self, order: torch.Tensor) -> torch.Tensor:
        """Each token's rank, [batch, n]: -1 for text, which all cuts keep; NEVER for padding.

        Args:
            order: LongTensor [batch, V], the visual tokens, best first, padding last.
        """
        every = self.prompts.ascending[: order.shape[1]].expand_as(order)
        if self.block is not None:
            start = self.block.start
            place = order + start if start else order
            return self.prompts.kept_always[:, : self.width].scatter(1, place, every)
        base = torch.where(self.column >= 0, -1, NEVER)
        return self._put(base, self.slots.gather(1, order), self.slot_mask, every)

    def ranks_of(self, kept: torch.Tensor) -> torch.Tensor:
        """The same, where what is kept is known: -1 for these visual tokens, too, and NEVER for the others.

        Args:
            kept: LongTensor [batch, K], positions among the visual tokens; then -1 as padding.
        """
        base = torch.where((self.column < 0) | self.is_visual, NEVER, -1)
        place = self.slots.gather(1, kept.clamp(min=0))
        return self._put(base, place, kept >= 0, torch.full_like(place, -1))

    def spread(self, values: torch.Tensor, default: torch.Tensor) -> torch.Tensor:
        """`default` [batch, n], with `values` [batch, V] in the visual tokens' places."""
        if not self.ragged:
            return default.scatter(1, self.slots, values)
        return self._put(default, self.slots, self.slot_mask, values)

    @staticmethod
    def _put(
        base: torch.Tensor, place: torch.Tensor, real: torch.Tensor, values: torch.Tensor
    ) -> torch.Tensor:
        """`base` [batch, n] with `values` at the places that are real."""
        # One place more takes the values of padding.
        base, width = torch.nn.functional.pad(base, (0, 1)), base.shape[1]
        return base.scatter_(1, place.where(real, width), values)[:, :width]


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
