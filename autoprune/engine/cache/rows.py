"""What is remembered of pruned prompts, in the order of a cache's rows."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch

from ..tokens.present import Tokens

# Kernels read masks in pieces of so many numbers.
ALIGNED = 8
# New tokens that a mask has room for when it is made.
ROOM = 128

# The methods of a cache layer that move its rows, and what each does with the rows of a tensor.
MOVES = {
    "reorder_cache": lambda rows, index: rows.index_select(0, index.to(rows.device)),
    "batch_select_indices": lambda rows, indices: rows[indices, ...],
    "batch_repeat_interleave": lambda rows, repeats: rows.repeat_interleave(repeats, dim=0),
}


class Masks(NamedTuple):
    """Additive masks [batch, 1, 1, all stages' places], where each stage's begin, and new tokens they have
    room for.
    """

    masks: torch.Tensor
    starts: list[int]
    room: int


class Rows:
    """Which tokens of its prompt each row of a cache holds, for all stages of a prefill.

    It never changes: a layer whose rows are moved goes on with other `Rows`, and layers that are moved alike
    have the same ones.

    Args:
        columns: LongTensor [batch, all stages' places]. The column of the prompt that each token came from; -1
            for padding, which is on the left.
        starts, widths: where each stage's tokens begin in it, and how many there are.
    """

    def __init__(self, columns: torch.Tensor, starts: Sequence[int], widths: Sequence[int]):
        self.columns, self.starts, self.widths = columns, tuple(starts), tuple(widths)
        self._forget()

    @classmethod
    def of(cls, stages: Sequence[Tokens]) -> Rows:
        widths = [tokens.width for tokens in stages]
        sizes = [_aligned(width) for width in widths]
        columns = [tokens.column for tokens in stages]
        spare = columns[0].new_full((len(columns[0]), ALIGNED), -1)
        pieces = zip(columns, sizes, widths, strict=True)
        parts = [
            part for column, size, width in pieces for part in (column, spare[:, : size - width])
        ]
        return cls(torch.cat(parts, dim=1), _starts(sizes), widths)

    def _forget(self) -> None:
        self._masks: dict[torch.dtype, Masks] = {}
        self._lengths: list[torch.Tensor] | None = None
        self._moved: tuple[str, Any, int | None, Rows] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"columns": self.columns, "starts": self.starts, "widths": self.widths}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()

    def __len__(self) -> int:
        return len(self.columns)

    def column(self, stage: int) -> torch.Tensor:
        """LongTensor [batch, n], columns of the tokens of a stage."""
        start = self.starts[stage]
        return self.columns[:, start : start + self.widths[stage]]

    def length(self, stage: int) -> torch.Tensor:
        """LongTensor [batch], real tokens of a stage."""
        if self._lengths is None:
            real = self.columns >= 0
            pieces = zip(self.starts, self.widths, strict=True)
            self._lengths = [real[:, start : start + n].sum(dim=1) for start, n in pieces]
        return self._lengths[stage]

    def mask(self, stage: int, new: int, dtype: torch.dtype) -> torch.Tensor:
        """What the last of `new` tokens behind a stage's may see, all but padding; it is made for many steps.

        Returns:
            Additive mask [batch, 1, 1, n + new].
        """
        made = self._masks.get(dtype)
        if made is None or made.room < new:
            made = self._masks[dtype] = self._make_masks(max(new, ROOM) + new, dtype)
        start = made.starts[stage]
        return made.masks[..., start : start + self.widths[stage] + new]

    def _make_masks(self, room: int, dtype: torch.dtype) -> Masks:
        sizes = [_aligned(width + room) for width in self.widths]
        starts, least = _starts(sizes), torch.finfo(dtype).min
        masks = torch.zeros(len(self), 1, 1, sum(sizes), dtype=dtype, device=self.columns.device)
        blocked = (self.columns < 0)[:, None, None]
        for start, first, width in zip(starts, self.starts, self.widths, strict=True):
            part = blocked[..., first : first + width]
            masks[..., start : start + width].masked_fill_(part, least)
        return Masks(masks, starts, room)

    def without_last(self, columns: int) -> Rows:
        """Without the last columns of the prompt, which are text in every row."""
        return Rows(self.columns, self.starts, [width - columns for width in self.widths])

    def moved(self, how: str, argument: Any) -> Rows:
        """As the method `how` of `MOVES` leaves them.

        A cache moves its layers one by one; they get the same answer.
        """
        version = _version(argument)
        if self._moved is not None:
            before, given, its_version, answer = self._moved
            if before == how and given is argument and version == its_version is not None:
                return answer
        move = MOVES[how]
        answer = Rows(move(self.columns, argument), self.starts, self.widths)
        for dtype, made in self._masks.items():
            answer._masks[dtype] = made._replace(masks=move(made.masks, argument))
        self._moved = how, argument, version, answer
        return answer


def _version(argument: Any) -> int | None:
    """Which of its values an argument has; None if a later call with it may bring others."""
    if isinstance(argument, int):
        return 0
    if not isinstance(argument, torch.Tensor):
        return None
    return 0 if argument.is_inference() else argument._version


def _aligned(number: int) -> int:
    return -(-number // ALIGNED) * ALIGNED


def _starts(sizes: Sequence[int]) -> list[int]:
    return [0, *accumulate(sizes)][:-1]
