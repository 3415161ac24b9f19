"""How many tokens prompts have behind cuts that follow each other, and where that puts them."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

import numpy as np
import torch

from ...parts.transfer import to_device
from .packing import WORTH_PACKING, Packing
from .present import Tokens


class Sizes:
    """How many tokens the prompts have at depths that follow each other, each of them behind a cut.

    Args:
        tokens, packing: present before the first of these cuts.
        counts: int [depths, batch], visual tokens.
        may_pack: whether depths may be packed.
    """

    def __init__(self, tokens: Tokens, packing: Packing | None, counts: np.ndarray, may_pack: bool):
        self.device, self.batch = tokens.column.device, tokens.batch
        self.counts = counts
        self.lengths = counts + np.array(tokens.lengths) - np.array(tokens.counts)
        self.widths, real = self.lengths.max(axis=1), self.lengths.sum(axis=1)
        every = self.batch * self.widths
        self.packed = (every - real >= WORTH_PACKING * np.maximum(real, 1)) & may_pack
        self.padded = bool(((every > real) & ~self.packed).any())
        # Hidden states of all depths behind each other, and those that are packed once more with padding.
        self.ends = np.where(self.packed, real, every).cumsum()
        self.padded_ends = np.where(self.packed, every, 0).cumsum()
        number = np.arange(1, self.batch + 1)
        last = np.cumsum(tokens.lengths) if packing else number * tokens.width
        self._last_rows_now = last - 1
        self._heads = 0 if tokens.heads is None else np.array(tokens.heads)
        self._held: dict[Any, torch.Tensor] = {}

    def rows(self, depth: int) -> slice:
        """Those of a depth among all hidden states."""
        return _span(self.ends, depth)

    def padded_rows(self, depth: int) -> slice:
        """The same in padded form, of a depth that is packed."""
        return _span(self.padded_ends, depth)

    @cached_property
    def _before_first(self) -> tuple[np.ndarray, np.ndarray]:
        """The row before each prompt's first token, [depths, batch]: packed, and with padding in front."""
        width = self.widths[:, None]
        padded = np.arange(1, self.batch + 1) * width - self.lengths - 1
        return self.lengths.cumsum(axis=1) - self.lengths - 1, padded

    @cached_property
    def numbers(self) -> torch.Tensor:
        """LongTensor [10, depths, batch].

        What each prompt keeps. The row before its first one: in its own depth, among all depths, and the same
        two with padding. The place of its first visual token, where they are in one piece. What fills padding,
        and how many rows there are: in hidden states, and the same for packed depths with padding.
        """
        packed_first, padded = self._before_first
        held = np.where(self.packed[:, None], packed_first, padded)
        starts, padded_starts = (
            np.concatenate([[0], ends[:-1]])[:, None] for ends in (self.ends, self.padded_ends)
        )
        first_slot = self.widths[:, None] - self.lengths + self._heads
        table = [self.counts, held, held + starts, padded, padded + padded_starts, first_slot]
        # What is not finite in one prompt must reach no other: padding holds a token of its own prompt. In
        # hidden states that is the last one of the depth before, in a packed depth its own first one.
        before = np.concatenate([self._last_rows_now[None], (held + self.lengths)[:-1]])
        rows = np.where(self.packed[:, None], self.lengths, self.widths[:, None])
        last = self.lengths.sum(axis=1, keepdims=True) - 1
        first = np.minimum(packed_first + 1, np.maximum(last, 0))
        padded_rows = np.where(self.packed, self.widths, 0)[:, None].repeat(self.batch, axis=1)
        # One row more takes what is dropped.
        rows[-1, -1] += 1
        padded_rows[-1, -1] += 1
        return to_device(np.stack([*table, before, rows, first, padded_rows]), self.device)

    def held(self, name: Any, make: Callable[[], torch.Tensor]) -> torch.Tensor:
        """What all depths hold under a name: made once, and filled by one plan after the other."""
        if name not in self._held:
            self._held[name] = make()
        return self._held[name]

    def rows_for_padding(self) -> torch.Tensor:
        """LongTensor [rows of all depths + 1]: a row of the same prompt in the depth before."""
        return self._repeated(6, int(self.ends[-1]) + 1)

    def packed_rows_for_padding(self) -> torch.Tensor:
        """LongTensor [padded rows of all depths + 1]: a packed row of the same prompt and depth."""
        return self._repeated(8, int(self.padded_ends[-1]) + 1)

    def _repeated(self, row: int, total: int) -> torch.Tensor:
        values, number = self.numbers[row].flatten(), self.numbers[row + 1].flatten()
        # One number alone would come as a view that is written to in vain.
        return values.repeat_interleave(number, output_size=total).contiguous()


def _span(ends: np.ndarray, depth: int) -> slice:
    return slice(int(ends[depth - 1]) if depth else 0, int(ends[depth]))
