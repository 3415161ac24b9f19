"""What cuts leave of the tokens that are present: decided once, applied everywhere.

A cut that only drops tokens follows from a rank for each token and the number that each prompt keeps. All
cuts that one ranking decides are planned together, so that each of them is one `index_select` later
(`engine/prefill.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch

from ...parts.transfer import to_device
from .packing import Packing
from .present import NEVER, Tokens, blocked_by_half
from .sizes import Sizes
from .summary import Mean, Standing

# What padding holds: a number, or what makes a tensor of it; None where there is no padding.
Padding = Callable[[], torch.Tensor] | float | None


@dataclass(eq=False)
class Stage:
    """The layers between two cuts.

    tokens: those that enter them; packing: how hidden states hold these.
    columns, rows: their columns are these rows of it; None before the first cut.
    """

    first_layer: int
    tokens: Tokens
    packing: Packing | None = None
    columns: Columns | None = None
    rows: slice | None = None

    @property
    def share(self) -> float:
        """Of `columns`, how much is this stage's."""
        if self.columns is None or self.rows is None:
            return 1.0
        return (self.rows.stop - self.rows.start) / max(len(self.columns), 1)


@dataclass(frozen=True)
class Cut:
    """What is done before the first layer of a stage.

    source: LongTensor [rows]: for each row of the new hidden states which row of the old ones it is. Rows are
        those of [batch, n] or of a packed [1, total], flattened.
    mean: what becomes of the summaries; None without any.
    """

    stage: Stage
    source: torch.Tensor
    mean: Mean | None = None


class Columns:
    """The columns of tokens in the form of hidden states, for several depths behind each other.

    What follows the columns, such as rotary embeddings, is taken for all of these depths at once.

    Args:
        columns: LongTensor [rows]; -1 for padding, if there is any.
        prompt: gives LongTensor [rows], which prompt each belongs to; None for a single prompt.
    """

    def __init__(
        self, columns: torch.Tensor, prompt: Callable[[], torch.Tensor] | None, padded: bool
    ):
        self._columns = columns.clamp(min=0) if padded else columns
        self._prompt = prompt
        self._taken: dict[int, tuple[Any, torch.Tensor]] = {}

    def __len__(self) -> int:
        return len(self._columns)

    @property
    def nbytes(self) -> int:
        """Of what was taken."""
        return sum(taken.nbytes for _, taken in self._taken.values())

    def take(self, values: torch.Tensor, source: Any, dim: int) -> torch.Tensor:
        """From [..., batch or 1, S, ...] to [..., rows, ...].

        Args:
            source: what the values were made of. They are taken once for it.
            dim: where S is, from behind: -1, or -2 with features.
        """
        if id(source) not in self._taken:
            batch, length = values.shape[dim - 1], values.shape[dim]
            index = self._columns
            if batch > 1 and self._prompt is not None:
                index, values = index + self._prompt() * length, values.flatten(dim - 1, dim)
            else:
                values = values.squeeze(dim - 1)
            # The source is held, so that its id stays its own.
            self._taken[id(source)] = source, values.index_select(dim, index.to(values.device))
        return self._taken[id(source)][1]


class Plan:
    """The cuts that one ranking decides.

    Args:
        tokens, packing: what is present.
        ranks: LongTensor [batch, n]: a cut that keeps k visual tokens of a prompt keeps ranks below k.
        sizes: of these cuts, and of others.
        depths: which of the sizes are these cuts'.
        standing: the summaries that take in what is dropped; None without any.
    """

    def __init__(
        self,
        tokens: Tokens,
        packing: Packing | None,
        ranks: torch.Tensor,
        sizes: Sizes,
        depths: range,
        standing: Standing | None = None,
    ):
        self.standing = standing
        self.tokens, self.packing, self.sizes, self.depths = tokens, packing, sizes, depths
        # The depth before the first cut is the present one: it says which row each token has now.
        start, known = depths.start, int(depths.start > 0)
        numbers = sizes.numbers[:, start - known : depths.stop, :, None]
        # All of these are [cuts, batch, n], for each token that is present.
        kept = ranks < numbers[0]
        order = kept.cumsum(dim=2)
        place, goes = order + numbers[1:3]
        self._before = place[:-1] if known else None
        self._numbers, self._kept = numbers[:, known:], kept[known:]
        self._order, self.place = order[known:], place[known:]
        self._goes = goes[known:].where(self._kept, int(sizes.ends[-1]))
        self._real = None if standing is None else ranks < NEVER
        self._padding_masks: dict[tuple[bool, torch.dtype], torch.Tensor] = {}

    def cuts(self, layers: Sequence[int]) -> list[Cut]:
        """The cuts, one before each of these layers."""
        sizes, padded = self.sizes, self.sizes.padded
        before = self._before
        if before is None:
            before = self._now if len(layers) == 1 else torch.cat([self._now, self.place[:-1]])
        source = self._put("source", before, sizes.rows_for_padding if padded else None)
        columns = self._put(None, self.tokens.column, -1 if padded else None)
        span = slice(sizes.rows(self.depths[0]).start, sizes.rows(self.depths[-1]).stop)
        prompt = partial(self._prompt, span) if sizes.batch > 1 else None
        shared = Columns(columns[span], prompt, padded)
        means = self._means()
        cuts: list[Cut] = []
        for layer, depth in zip(layers, self.depths, strict=True):
            rows = sizes.rows(depth)
            packing = self._packing(depth) if sizes.packed[depth] else None
            within = slice(rows.start - span.start, rows.stop - span.start)
            stage = Stage(layer, self._left(depth, columns), packing, shared, within)
            cuts.append(Cut(stage, source[rows], None if means is None else means[len(cuts)]))
        # Masks of padding need no more than where tokens go.
        del self._kept, self._order
        return cuts

    def _left(self, depth: int, columns: torch.Tensor) -> Tokens:
        sizes, tokens, index, bias = self.sizes, self.tokens, self._index_with_new, self._bias
        rows = sizes.rows(depth)
        if sizes.packed[depth]:
            columns, rows = self._padded_columns, sizes.padded_rows(depth)
            index, bias = self._padded_index_with_new, self._padded_bias
        shape = sizes.batch, int(sizes.widths[depth])
        return Tokens(
            tokens.prompts,
            sizes.lengths[depth].tolist(),
            sizes.counts[depth].tolist(),
            columns[rows].view(shape),
            tokens.heads,
            was_cut=True,
            index_with_new=None if index is None else index[rows].view(shape),
            first_slot=None if tokens.heads is None else sizes.numbers[5, depth],
            number=sizes.numbers[0, depth],
            planned_padding_mask=(
                partial(self._padding_mask, rows, shape, sizes.packed[depth])
                if shape[0] * shape[1] > sizes.lengths[depth].sum()
                else None
            ),
            bias=None if bias is None else bias[rows].view(shape),
        )

    def _means(self) -> list[Mean] | None:
        """What becomes of the summaries at each cut."""
        standing = self.standing
        if standing is None:
            return None
        assert self._real is not None
        # Who is kept by a cut was there before it.
        weights = standing.weights(torch.cat([self._real[None], self._kept[:-1]]) ^ self._kept)
        rows = standing.rows(self.place)
        # Weights are of what stood before a cut, in the form in which attention sees it.
        held, padded = None, None
        means = []
        for number, depth in enumerate(self.depths):
            if not number:
                own = weights[0]
            elif self.sizes.packed[depth - 1]:
                if padded is None:
                    padded = _put_at(self._goes_padded, weights, int(self.sizes.padded_ends[-1]))
                own = padded[self.sizes.padded_rows(depth - 1)]
            else:
                if held is None:
                    held = _put_at(self._goes, weights, int(self.sizes.ends[-1]))
                own = held[self.sizes.rows(depth - 1)]
            own = own.view(self.sizes.batch, 1, -1)
            means.append(Mean(own, rows[number], standing.prompts, standing.typical))
        return means

    @cached_property
    def _bias(self) -> torch.Tensor | None:
        bias = self._biases
        return None if bias is None else self._put(None, bias, 0.0)

    @cached_property
    def _padded_bias(self) -> torch.Tensor | None:
        bias = self._biases
        return None if bias is None else self._put_padded(None, bias, 0.0)

    @cached_property
    def _biases(self) -> torch.Tensor | None:
        """Of the tokens present at each depth, float32 [cuts or none, batch, n]."""
        bias = self.tokens.bias
        return bias if self.standing is None else self.standing.biases(bias)

    def _padding_mask(
        self, rows: slice, shape: tuple[int, int], packed: bool, dtype: torch.dtype
    ) -> torch.Tensor:
        if (packed, dtype) not in self._padding_masks:
            put = self._put_padded if packed else self._put
            real = torch.zeros((), dtype=dtype, device=self._device)
            mask = put(("mask", dtype, packed), real, blocked_by_half(dtype))
            self._padding_masks[packed, dtype] = mask
        return self._padding_masks[packed, dtype][rows].view(shape)

    @property
    def _now(self) -> torch.Tensor:
        """LongTensor [1, batch, n], the row of each token that is present."""
        if self.packing is not None:
            return self.packing.place[None]
        batch, width = self.tokens.column.shape
        if batch == 1:
            return self.tokens.prompts.ascending[None, None, :width]
        return torch.arange(batch * width, device=self._goes.device).view(1, batch, width)

    def _put(self, name: Any, values: torch.Tensor, padding: Padding) -> torch.Tensor:
        """Values of the tokens present, [batch, n] or [cuts, batch, n], where they go in hidden states.

        Args:
            name: of what all depths hold together; None where the values are of tokens that were planned so, as
                nothing is written where it is read.
        """
        # One row more takes what is dropped.
        rows = int(self.sizes.ends[-1]) + 1
        held = self._held(name, partial(_filled, padding, rows, values.dtype, self._device))
        return held.index_put_((self._goes,), values.to(self._device))

    def _held(self, name: Any, make: Callable[[], torch.Tensor]) -> torch.Tensor:
        return make() if name is None else self.sizes.held(name, make)

    def _prompt(self, span: slice) -> torch.Tensor:
        batch = torch.arange(self.sizes.batch, device=self._device)[:, None]
        return self._put("prompt", batch, 0 if self.sizes.padded else None)[span]

    @property
    def _device(self) -> torch.device:
        return self._goes.device

    @cached_property
    def _goes_padded(self) -> torch.Tensor:
        goes = self._order + self._numbers[4]
        packed = self.sizes.packed[self.depths.start : self.depths.stop]
        kept = self._kept
        if not packed.all():
            kept = kept & to_device(packed, kept.device)[:, None, None]
        return goes.where(kept, int(self.sizes.padded_ends[-1]))

    @cached_property
    def _padded_columns(self) -> torch.Tensor:
        return self._put_padded(None, self.tokens.column, -1)

    @cached_property
    def _index_with_new(self) -> torch.Tensor | None:
        index = self.tokens.index_with_new
        return None if index is None else self._put(None, index, -1)

    @cached_property
    def _padded_index_with_new(self) -> torch.Tensor | None:
        index = self.tokens.index_with_new
        return None if index is None else self._put_padded(None, index, -1)

    def _put_padded(self, name: Any, values: torch.Tensor, padding: Padding) -> torch.Tensor:
        """The same with padding, for the depths that are packed."""
        rows = int(self.sizes.padded_ends[-1]) + 1
        held = self._held(name, partial(_filled, padding, rows, values.dtype, self._device))
        return held.index_put_((self._goes_padded,), values.to(self._device))

    @cached_property
    def _maps(self) -> tuple[torch.Tensor, torch.Tensor]:
        """For all depths: the packed row of each padded one, and the padded row of each packed one."""
        unpack = self._put_padded("unpack", self.place, self.sizes.packed_rows_for_padding)
        return unpack, self._put("pack", self._order + self._numbers[3], None)

    def _packing(self, depth: int) -> Packing:
        unpack, pack = self._maps
        place = unpack[self.sizes.padded_rows(depth)].view(self.sizes.batch, -1)
        return Packing(place, pack[self.sizes.rows(depth)])


def _put_at(goes: torch.Tensor, weights: torch.Tensor, rows: int) -> torch.Tensor:
    """Weights of each cut but the first, [cuts, batch, n], at the rows that tokens have before it."""
    held = weights.new_zeros(rows + 1)
    return held.index_put_((goes[:-1],), weights[1:])


def _filled(padding: Padding, rows: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A tensor [rows] of what padding holds; of anything where there is no padding."""
    if callable(padding):
        return padding()
    if padding is None:
        return torch.empty(rows, dtype=dtype, device=device)
    return torch.full((rows,), padding, dtype=dtype, device=device)
