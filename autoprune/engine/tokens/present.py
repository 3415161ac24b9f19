"""The tokens that are present at one depth of the decoder, and where they are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch

from ...parts.transfer import all_to_device, to_device
from .layout import Layout

MERGED = -2
"""The index of a token that was made from dropped ones."""


@dataclass(eq=False)
class Tokens:
    """The tokens present at one depth, padded on the left to a common length n.

    column: LongTensor [batch, n], the column of the prompt each token came from; -1 for padding.
    index: LongTensor [batch, V], 0..N-1 of an original visual token, MERGED, or -1 for padding.
    ascending: LongTensor [1, n or more], 0, 1, ...
    lengths, counts: real tokens and visual tokens of each prompt (host).
    heads: how many tokens of each prompt stand before its visual ones, if those are in one piece in all
        prompts (host). Where every token is follows from these numbers then, if padding is on the left.
    places: `text` and `slots` where it does not follow.
    was_cut: whether this is what a cut left; the prompt itself may be padded on the right.
    merged: whether a cut made new tokens; two may have one column then.
    arranged: what `Arrangement` says, on the device, if it is there already.
    """

    column: torch.Tensor
    index: torch.Tensor
    ascending: torch.Tensor
    lengths: list[int]
    counts: list[int]
    heads: list[int] | None = None
    places: tuple[torch.Tensor, torch.Tensor] | None = None
    was_cut: bool = False
    merged: bool = False
    arranged: Arrangement | None = None

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
            torch.arange(len(columns), device=device)[None],
            lengths=real.sum(axis=1).tolist(),
            counts=counts,
            heads=heads,
            places=places,
        )

    def without_last(self, columns: int) -> Tokens:
        """Without the last columns, which are text, and without what was made on the way."""
        width, places = self.width - columns, self.places
        if places is not None:
            text, slots = places
            places = text[:, : text.shape[1] - columns], slots
        return replace(
            self,
            column=self.column[:, :width],
            lengths=[n - columns for n in self.lengths],
            places=places,
            arranged=None,
        )

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
            return self.ascending[:, self.block].expand(len(self.column), -1)
        return self.arrangement.slots

    @property
    def geometry(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Heads (0 where they are not known), lengths and counts, each [batch, 1]."""
        heads = [0] * len(self.counts) if self.heads is None else self.heads
        return tuple(np.array(n)[:, None] for n in (heads, self.lengths, self.counts))  # type: ignore

    @cached_property
    def slot_mask(self) -> torch.Tensor:
        """bool [batch, V], False beyond a prompt's own count."""
        if not self.ragged:
            return torch.ones_like(self.index, dtype=torch.bool)
        return self.arrangement.slot_mask

    @property
    def arrangement(self) -> Arrangement:
        """What follows from the numbers of tokens; for prompts padded on the left."""
        if self.arranged is None:
            arrays = Arrangement.on_host(self.width, *self.geometry)
            self.arranged = Arrangement(*all_to_device(arrays, self.column.device))
        return self.arranged

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


@dataclass(frozen=True)
class Arrangement:
    """Where the tokens of prompts are that are padded on the left to n, visual tokens in one piece.

    slots: LongTensor [batch, V], places of the visual tokens; any beyond a prompt's own count, and any at
        all where they are not in one piece: `Tokens.slots` knows.
    slot_mask: bool [batch, V], False there.
    first_seen: LongTensor [batch, n], the first place that a token sees; padding sees itself.
    packed: LongTensor [batch, n], each token's place in a row of all prompts' real tokens; for padding that
        of its prompt's first one, so that what is not finite in one prompt reaches no other.
    real: LongTensor [total], the places of that row's tokens among the batch * n padded ones.
    """

    slots: torch.Tensor
    slot_mask: torch.Tensor
    first_seen: torch.Tensor
    packed: torch.Tensor
    real: torch.Tensor

    @staticmethod
    def on_host(
        width: int, heads: np.ndarray, lengths: np.ndarray, counts: np.ndarray
    ) -> list[np.ndarray]:
        """The fields in their order, from n and the numbers of tokens, each [batch, 1]."""
        place, rank, first = np.arange(width), np.arange(counts.max()), width - lengths
        real = place >= first
        return [
            np.minimum(first + heads + rank, max(width - 1, 0)),
            rank < counts,
            np.minimum(place, first),
            _packed(real),
            np.flatnonzero(real),
        ]


def _packed(real: np.ndarray) -> np.ndarray:
    """`Arrangement.packed` of bool [batch, n]."""
    number = real.sum(axis=1, keepdims=True)
    first = number.cumsum(axis=0) - number
    place = np.where(real, first + real.cumsum(axis=1) - 1, first)
    return np.minimum(place, max(int(number.sum()) - 1, 0))


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
