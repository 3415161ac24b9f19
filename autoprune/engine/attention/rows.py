"""What a method is shown at a cut, collected while the layer before it (or behind it) runs."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ...contract import Needs, Observation, Rows
from ...errors import UnsupportedError
from ...parts.transfer import all_to_device, to_device
from ..tokens.layout import Layout, TextRows
from ..tokens.present import Tokens
from .masks import has_pattern, row_mask, rows_are_causal
from .row_attention import row_attention

if TYPE_CHECKING:
    from ..vision.view import VisionView


SCORE_BYTES = 64 * 2**20
"""Long questions have their attention computed a few heads at a time, so that scores stay below this."""

WORTH_COPYING = 2**20
"""Bytes of attention on other tokens than visual ones that may be kept along with those."""

ROWS_AT_ONCE = 32
"""Rows of a sample are looked at in pieces of this, each over the keys up to its own last row."""


class SeenEnough(Exception):
    """Ends a layer that was only run to see its attention."""


class Observer:
    """Collects what the next cut needs, in one prefill.

    needs: of the next cut; None if nothing is cut there.
    peeking: whether a layer runs only to be seen, and is to be left with `SeenEnough`.
    """

    def __init__(self, layout: Layout, vision: VisionView | None, device: torch.device):
        self.layout, self.device = layout, device
        self.needs: Needs | None = None
        self.peeking = False
        self._vision = self._by_prompt(vision)
        # By whether the layer is the one behind the cut; attention by its rows, too.
        self._attention: dict[tuple[bool, Rows | None], torch.Tensor] = {}
        self._projections: dict[bool, tuple[torch.Tensor, torch.Tensor]] = {}
        self._text: dict[Rows, _Rows] = {}
        self._causal: dict[Any, torch.Tensor] = {}
        # Of prompts that end with their picture, which tokens stay; None if there are none.
        self._ends = np.array(layout.ends_visual)[:, None] if any(layout.ends_visual) else None
        # Bytes that the last look took at its fullest.
        self.looked_bytes = 0

    def expect(self, needs: Needs | None) -> None:
        """Forget what was seen, and look out for what the next cut needs."""
        self.needs, self._attention, self._projections = needs, {}, {}
        self.looked_bytes = 0

    def rows_ahead(self, needs: Needs, tokens: Tokens) -> torch.Tensor | slice | None:
        """Where the rows are whose queries a look ahead reads, in the present sequence; None for all tokens.

        Where several kinds of rows are asked for, the widest kind holds the others.
        """
        looks = needs.each(ahead=True)
        wanted = [name for name in ("all", "text", "last") if name in {one.rows for one in looks}]
        if not wanted or any(one.keys for one in looks):
            return None
        return self._rows(wanted[0], tokens)[0]

    @property
    def kept_bytes(self) -> int:
        """What is kept of the attention that was seen; keys usually are the cache's own."""
        if not (self._attention or self._projections):
            return 0
        queries = (query for query, _ in self._projections.values())
        kept = (*self._attention.values(), *queries)
        return sum(tensor.untyped_storage().nbytes() for tensor in kept)

    def see(
        self,
        tokens: Tokens,
        query: torch.Tensor,
        key: torch.Tensor,
        attention_mask: Any,
        scaling: float | None = None,
        softcap: float | None = None,
        **kwargs: Any,
    ) -> None:
        """A layer attends, with the tokens that are present: query and key [batch, heads, n, size].

        Raises:
            SeenEnough: nothing else of the layer is wanted.
        """
        wanted = [] if self.needs is None else self.needs.each(self.peeking)
        if not wanted:
            return
        key = key[:, :, : tokens.width]
        if any(needs.keys for needs in wanted):
            self._projections[self.peeking] = query, key
        for rows in {needs.rows for needs in wanted}:
            if rows is not None:
                self._attention[self.peeking, rows] = self._look(
                    rows, tokens, query, key, attention_mask, scaling, softcap
                )
        if self.peeking:
            raise SeenEnough

    def _look(
        self,
        name: Rows,
        tokens: Tokens,
        query: torch.Tensor,
        key: torch.Tensor,
        mask: Any,
        scaling: float | None,
        softcap: float | None,
    ) -> torch.Tensor:
        """Attention of the text rows on the visual tokens, float32 [batch, heads, text, V]."""
        slots, text = self._rows(name, tokens)
        heads, found = query.shape[1] // key.shape[1], list[torch.Tensor]()
        for piece in self._pieces(slots, text, tokens, mask, query.device):
            rows, columns = at_slots(query, piece.slots), key[:, :, : piece.keys]
            step = _key_heads_at_once(rows, columns)
            pairs: Any = [(rows, columns)]
            if step < key.shape[1]:
                pairs = zip(rows.split(step * heads, 1), columns.split(step, 1), strict=True)
            parts = []
            for some_rows, keys in pairs:
                attention = row_attention(
                    some_rows, keys, scaling, piece.blocked, piece.bias, softcap
                )
                parts.append(_columns(attention, tokens))
                self._count(rows, attention, [*found, *parts])
            found.append(torch.cat(parts, dim=1) if len(parts) > 1 else parts[0])
        attention = torch.cat(found, dim=2) if len(found) > 1 else found[0]
        return attention.to(text.mask.device)

    def _pieces(
        self,
        slots: torch.Tensor | slice,
        text: _Rows,
        tokens: Tokens,
        mask: Any,
        device: torch.device,
    ) -> Iterator[_Piece]:
        """The rows in the pieces they are looked at in, and what each may see."""
        if text.joined or isinstance(slots, slice):
            yield _Piece(slots, tokens.width, *self._row_mask(mask, tokens, slots, device))
            return
        # Where the rows stand alike and see all before them, the keys behind them need not be multiplied.
        alike = not tokens.padded and not has_pattern(mask)
        for start in range(0, slots.shape[1], ROWS_AT_ONCE):
            piece = slots[:, start : start + ROWS_AT_ONCE]
            if text.behind is not None and alike:
                behind = text.behind[start : start + ROWS_AT_ONCE]
                end = tokens.width - self.layout.drafts - int(behind[-1])
                yield _Piece(piece, end, self._blocked(start, behind, device), None)
            else:
                limits = self._row_mask(mask, tokens, piece, device)
                yield _Piece(piece, tokens.width, *limits)

    def _blocked(self, start: int, behind: np.ndarray, device: torch.device) -> torch.Tensor:
        """What rows that stand so far from the end may not see, of the keys from the first to the last of
        them: the same at every cut.
        """
        key = "piece", start
        blocked = self._causal.get(key)
        if blocked is None or blocked.device != device:
            place = behind[0] - behind
            later = np.arange(place[-1] + 1) > place[:, None]
            blocked = self._causal[key] = to_device(later[None, None], device)
        return blocked

    def _count(self, rows: torch.Tensor, attention: torch.Tensor, kept: list[torch.Tensor]) -> None:
        """Note what is held at once: queries, scores, shares of attention and what is kept of them."""
        own = attention.data_ptr(), attention.data_ptr() + attention.nbytes
        copies = sum(part.nbytes for part in kept if not own[0] <= part.data_ptr() < own[1])
        scores = attention.numel() * rows.element_size()
        held = rows.nbytes + scores + attention.nbytes + copies
        self.looked_bytes = max(self.looked_bytes, held)

    def observation(
        self, cut: int, needs: Needs, tokens: Tokens, hidden: torch.Tensor
    ) -> Observation:
        """All that was seen for a cut; `hidden` is [batch, n, hidden size].

        Raises:
            UnsupportedError: the attention did not come by.
        """
        slots, mask = tokens.slots if tokens.block is None else tokens.block, tokens.slot_mask
        attention = self._attention.get((needs.ahead, needs.rows))
        projections = self._projections.get(needs.ahead)
        seen = Observation(cut, list(tokens.counts), tokens.index, mask, attention)
        if needs.rows is not None or needs.hidden or needs.keys:
            text, rows = self._rows(needs.rows or "text", tokens)
            seen.text_mask = rows.mask
            seen.no_padding = rows.all_real
        if (needs.rows is not None and attention is None) or (needs.keys and projections is None):
            raise UnsupportedError(
                f"the attention of decoder layer {cut - (not needs.ahead)} was not seen: its backend does "
                "not go through transformers' attention functions; use attn_implementation='sdpa'"
            )
        if needs.hidden:
            seen.hidden, seen.text_hidden = (
                partial(at_slots, hidden, slots),
                partial(at_slots, hidden, text),
            )
        if needs.keys and projections is not None:
            query, key = projections
            seen.keys, seen.text_keys = partial(at_slots, key, slots), partial(at_slots, key, text)
            seen.queries = partial(at_slots, query, slots)
        if needs.vision:
            self._add_vision(seen, tokens)
        if self._ends is not None:
            place = np.array(tokens.counts)[:, None] - 1
            required = self._ends & (np.arange(tokens.index.shape[1]) == place)
            seen.required = to_device(required, tokens.index.device)
        if needs.beside is not None:
            seen.beside = self.observation(cut, needs.beside, tokens, hidden)
        return seen

    def _add_vision(self, seen: Observation, tokens: Tokens) -> None:
        if not tokens.was_cut:
            for name, values in self._vision.items():
                setattr(seen, name, values)
            return
        visual = tokens.index
        original = visual.clamp(min=0)
        for name, values in self._vision.items():
            index = original.view(*original.shape, *[1] * (values.ndim - 2))
            taken = values.gather(1, index.expand(-1, -1, *values.shape[2:]))
            absent = False if values.dtype == torch.bool else float("nan")
            setattr(seen, name, taken.masked_fill((visual < 0).view(index.shape), absent))

    def _by_prompt(self, vision: VisionView | None) -> dict[str, torch.Tensor]:
        """What the tower gave, [prompts, N, ...], filled with NaN (or False) behind a prompt's own."""
        stacked = {}
        for name, rows in (vision.per_prompt(self.layout.num_visual) if vision else {}).items():
            if len(rows) == 1:
                padded = rows[0][None]
            else:
                fill = False if rows[0].dtype == torch.bool else float("nan")
                padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=fill)
            stacked[name] = padded.to(self.device)
        return stacked

    def _rows(self, rows: Rows, tokens: Tokens) -> tuple[torch.Tensor | slice, _Rows]:
        """Where the text rows are in the present sequence, and in the prompt."""
        if rows not in self._text:
            self._text[rows] = _Rows.of(self.layout.text_rows(rows), self.device)
        text = self._text[rows]
        # A cut pads on the left and drops nothing behind the last visual token.
        end, at_end = tokens.width - self.layout.drafts, tokens.was_cut or not tokens.padded
        if text.are_last or (text.joined and tokens.was_cut):
            return slice(end - text.mask.shape[1], end), text
        return (end - 1 - text.distance if at_end else text.column), text

    def _row_mask(
        self, mask: Any, tokens: Tokens, slots: torch.Tensor | slice, device: torch.device
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """`row_mask` on the device of the layer, which may be another than the prompt's."""
        if isinstance(slots, slice) and rows_are_causal(mask, tokens, slots):
            # The same at every cut: nothing behind the first of these rows is ever dropped.
            size = slots.stop - slots.start
            blocked = self._causal.get(size)
            if blocked is None or blocked.device != device:
                made, _ = row_mask(mask, tokens, slots)
                assert made is not None
                blocked = self._causal[size] = made.to(device)
            return blocked, None
        made, bias = row_mask(mask, tokens, slots)
        return (
            None if made is None else made.to(device),
            None if bias is None else bias.to(device),
        )


@dataclass(frozen=True)
class _Rows:
    """The text rows of the prompts, as `TextRows`, on the device.

    distance: LongTensor [batch, rows], how many tokens of its prompt stand behind each row; [1, rows] where
        that is the same in all prompts. behind: the same on the host, [rows], there; else None.
    all_real: whether no row is padding.
    """

    column: torch.Tensor
    mask: torch.Tensor
    distance: torch.Tensor
    behind: np.ndarray | None
    are_last: bool
    joined: bool
    all_real: bool

    @classmethod
    def of(cls, rows: TextRows, device: torch.device) -> _Rows:
        behind = rows.behind[:1] if rows.alike else rows.behind
        column, mask, distance = all_to_device([rows.column, rows.mask, behind], device)
        shared, all_real = behind[0] if rows.alike else None, bool(rows.mask.all())
        return cls(column, mask, distance, shared, rows.are_last, rows.joined, all_real)


@dataclass(frozen=True)
class _Piece:
    """Rows that are looked at together.

    slots: their places in the present sequence; keys: how many of the keys they are multiplied with.
    blocked, bias: of `row_attention`, for these keys.
    """

    slots: torch.Tensor | slice
    keys: int
    blocked: torch.Tensor | None
    bias: torch.Tensor | None


def at_slots(states: torch.Tensor, slots: torch.Tensor | slice) -> torch.Tensor:
    """Entries of [batch, n, size] or [batch, heads, n, size] at `slots`, [batch, m] or the same for all."""
    if isinstance(slots, slice):
        return states[..., slots, :]
    slots = slots.to(states.device)
    if len(slots) == 1:
        return states.index_select(states.ndim - 2, slots[0])
    index = slots.view(slots.shape[0], *[1] * (states.ndim - 3), -1, 1)
    shape = (*states.shape[:-2], slots.shape[1], states.shape[-1])
    return states.gather(states.ndim - 2, index.expand(shape))


def _key_heads_at_once(rows: torch.Tensor, key: torch.Tensor) -> int:
    """Of queries [batch, heads, rows, size] and keys [batch, key heads, n, size]."""
    scores = 4 * math.prod(rows.shape[:3]) * key.shape[2]
    return max(1, key.shape[1] * SCORE_BYTES // max(scores, SCORE_BYTES))


def _columns(attention: torch.Tensor, tokens: Tokens) -> torch.Tensor:
    """The visual tokens' columns of [batch, heads, rows, n]."""
    if tokens.block is not None:
        columns = attention[..., tokens.block]
        # A view would keep all of it; that is worth a copy where much is not visual.
        rest = attention.nbytes - columns.nbytes
        return columns.clone() if rest > max(columns.nbytes, WORTH_COPYING) else columns
    slots = tokens.slots.to(attention.device)
    return attention.gather(3, slots[:, None, None].expand(*attention.shape[:3], -1))
