"""The tokens that are present at one depth of the decoder, and where they are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch

from ..transfer import all_to_device, to_device
from .layout import Layout

MERGED = -2
"""The index of a token that was made from dropped ones."""


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
        heads, lengths, counts = self.geometry
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
    def geometry(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
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
