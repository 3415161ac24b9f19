"""Which columns of its prompt each row of a cache holds, stage by stage, and the masks that follow from it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch

from ..tokens.present import Tokens

# Kernels read masks in pieces of so many numbers.
ALIGNED = 8
# New tokens that a mask has room for when it is made.
ROOM = 128

# The methods of a cache layer that move its rows, and what each does with the rows of a tensor.
MOVES: dict[str, Callable[[torch.Tensor, Any], torch.Tensor]] = {
    "reorder_cache": lambda rows, index: rows.index_select(0, index.to(rows.device)),
    "batch_select_indices": lambda rows, indices: rows[indices, ...],
    "batch_repeat_interleave": lambda rows, repeats: rows.repeat_interleave(repeats, dim=0),
}


class Masks(NamedTuple):
    """Additive masks of all stages, made for many steps.

    values: [batch, 1, 1, all stages' places]; starts: where each stage's begin.
    room: new tokens that each stage has places for.
    """

    values: torch.Tensor
    starts: list[int]
    room: int


class HeldColumns:
    """Which tokens of its prompt each row of a cache holds, for all stages of a prefill.

    It never changes. When the rows of a layer are moved, the layer gets another `HeldColumns`; layers that
    are moved alike share one.

    Args:
        columns: LongTensor [batch, all stages' places]. The column of the prompt that each token came from; -1
            for padding, which is on the left.
        starts, widths: where each stage's tokens begin in it, and how many there are.
        first: LongTensor [batch], the column of each row's first token, from which chunks are counted. None for
            layers without chunks.
        bias: float32, as `columns`: what is added to the scores of attention on each token (`Tokens.bias`).
            None for nothing.
    """

    def __init__(
        self,
        columns: torch.Tensor,
        starts: Sequence[int],
        widths: Sequence[int],
        first: torch.Tensor | None = None,
        bias: torch.Tensor | None = None,
    ):
        self.columns, self.starts, self.widths = columns, tuple(starts), tuple(widths)
        self.first, self.bias = first, bias
        self._clear()

    @classmethod
    def of(cls, stages: Sequence[Tokens], first: torch.Tensor | None) -> HeldColumns:
        widths = [tokens.width for tokens in stages]
        sizes = [aligned(width) for width in widths]
        # What aligns a stage is never read, so any columns do.
        spare = stages[0].column[:, :1].expand(-1, ALIGNED)
        parts = [
            part
            for tokens, size in zip(stages, sizes, strict=True)
            for part in (tokens.column, spare[:, : size - tokens.width])
        ]
        bias = None
        if any(tokens.bias is not None for tokens in stages):
            none = torch.zeros(spare.shape, device=spare.device)
            pieces = [
                part
                for tokens, size in zip(stages, sizes, strict=True)
                for part in (_bias_of(tokens), none[:, : size - tokens.width])
            ]
            bias = torch.cat(pieces, dim=1)
        return cls(torch.cat(parts, dim=1), starts_of(sizes), widths, first, bias)

    def _clear(self) -> None:
        """Forget what was made of the columns."""
        self._masks: dict[torch.dtype, Masks] = {}
        self._lengths: list[torch.Tensor] | None = None
        self._moved: tuple[str, Any, int | None, HeldColumns] | None = None

    def __getstate__(self) -> dict[str, Any]:
        names = "columns", "starts", "widths", "first", "bias"
        return {name: getattr(self, name) for name in names}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._clear()

    def __len__(self) -> int:
        return len(self.columns)

    def of_stage(self, stage: int) -> torch.Tensor:
        """LongTensor [batch, n], columns of the tokens of a stage."""
        start = self.starts[stage]
        return self.columns[:, start : start + self.widths[stage]]

    def bias_of_stage(self, stage: int) -> torch.Tensor | None:
        """The same of `bias`."""
        start = self.starts[stage]
        return None if self.bias is None else self.bias[:, start : start + self.widths[stage]]

    def lengths(self, stage: int) -> torch.Tensor:
        """LongTensor [batch], real tokens of a stage."""
        if self._lengths is None:
            real = self.columns >= 0
            pieces = zip(self.starts, self.widths, strict=True)
            self._lengths = [real[:, start : start + n].sum(dim=1) for start, n in pieces]
        return self._lengths[stage]

    def mask(self, stage: int, new: int, dtype: torch.dtype) -> torch.Tensor:
        """Which tokens of a stage, and which of `new` ones behind them, the last of these may see.

        Returns:
            Additive mask [batch, 1, 1, n + new] that hides padding alone, with what is added for sizes.
        """
        made = self._masks.get(dtype)
        if made is None or made.room < new:
            made = self._masks[dtype] = self._make_masks(max(new, ROOM) + new, dtype)
        start = made.starts[stage]
        return made.values[..., start : start + self.widths[stage] + new]

    def _make_masks(self, room: int, dtype: torch.dtype) -> Masks:
        sizes = [aligned(width + room) for width in self.widths]
        starts, least = starts_of(sizes), torch.finfo(dtype).min
        values = torch.zeros(len(self), 1, 1, sum(sizes), dtype=dtype, device=self.columns.device)
        blocked = (self.columns < 0)[:, None, None]
        for start, first, width in zip(starts, self.starts, self.widths, strict=True):
            part = blocked[..., first : first + width]
            own = values[..., start : start + width]
            if self.bias is not None:
                own.copy_(self.bias[:, None, None, first : first + width])
            own.masked_fill_(part, least)
        return Masks(values, starts, room)

    def without_last(self, columns: int) -> HeldColumns:
        """Without the last columns of the prompt, which are text in every row."""
        widths = [width - columns for width in self.widths]
        return HeldColumns(self.columns, self.starts, widths, self.first, self.bias)

    def moved(self, how: str, argument: Any) -> HeldColumns:
        """As the method `how` of `MOVES` leaves them.

        A cache moves its layers one by one; they get the same answer.
        """
        version = _version(argument)
        if self._moved is not None:
            before, given, its_version, answer = self._moved
            if before == how and given is argument and version == its_version is not None:
                return answer
        move = MOVES[how]
        columns, first, bias = (
            None if rows is None else move(rows, argument)
            for rows in (self.columns, self.first, self.bias)
        )
        assert columns is not None
        answer = HeldColumns(columns, self.starts, self.widths, first, bias)
        for dtype, made in self._masks.items():
            answer._masks[dtype] = made._replace(values=move(made.values, argument))
        self._moved = how, argument, version, answer
        return answer


def _bias_of(tokens: Tokens) -> torch.Tensor:
    if tokens.bias is not None:
        return tokens.bias
    return torch.zeros(tokens.column.shape, device=tokens.column.device)


def _version(argument: Any) -> int | None:
    """Which of its values an argument has; None if a later call with it may bring others."""
    if isinstance(argument, int):
        return 0
    if not isinstance(argument, torch.Tensor):
        return None
    return 0 if argument.is_inference() else argument._version


def aligned(number: int) -> int:
    """The next multiple of `ALIGNED`."""
    return -(-number // ALIGNED) * ALIGNED


def starts_of(sizes: Sequence[int]) -> list[int]:
    """Where pieces of these sizes begin, one behind the other."""
    return [0, *accumulate(sizes)][:-1]
