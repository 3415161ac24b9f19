"""What a method is shown at a cut, collected while the layer before it (or behind it) runs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from ..errors import UnsupportedError
from ..method import Needs, Observation
from ..transfer import to_device
from .layout import Layout
from .masks import row_mask, rows_are_causal
from .tap import row_attention
from .tokens import Tokens

if TYPE_CHECKING:
    from .vision_view import VisionView


SCORE_BYTES = 64 * 2**20
"""Long questions have their attention computed a few heads at a time, so that scores stay below this."""

WORTH_COPYING = 2**20
"""Bytes of attention on other tokens than visual ones that may be kept along with those."""


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
        self._attention: dict[tuple[bool, str], torch.Tensor] = {}
        self._projections: dict[bool, tuple[torch.Tensor, torch.Tensor]] = {}
        self._text: dict[str, _Rows] = {}
        self._causal: dict[int, torch.Tensor] = {}

    def expect(self, needs: Needs | None) -> None:
        """Forget what was seen, and look out for what the next cut needs."""
        self.needs, self._attention, self._projections = needs, {}, {}

    @property
    def kept_bytes(self) -> int:
        """What is kept of the attention that was seen; keys usually are the cache's own."""
        queries = (query for query, _ in self._projections.values())
        kept = (*self._attention.values(), *queries)
        return sum(tensor.untyped_storage().nbytes() for tensor in kept)

    def see(
        self, tokens: Tokens, query, key, attention_mask, scaling=None, softcap=None, **kwargs
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
        for which in {needs.rows for needs in wanted} - {None}:
            slots, text = self._rows(which, tokens)
            mask = self._row_mask(attention_mask, tokens, slots, query.device)
            rows, heads = take(query, slots), query.shape[1] // key.shape[1]
            step = _key_heads_at_once(rows, key)
            pairs: Any = [(rows, key)]
            if step < key.shape[1]:
                pairs = zip(rows.split(step * heads, 1), key.split(step, 1), strict=True)
            parts = [
                _columns(row_attention(*pair, scaling, *mask, softcap), tokens) for pair in pairs
            ]
            attention = torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]
            self._attention[self.peeking, which] = attention.to(text.mask.device)
        if self.peeking:
            raise SeenEnough

    def observation(
        self, cut: int, needs: Needs, tokens: Tokens, hidden: torch.Tensor
    ) -> Observation:
        """All that was seen for a cut; `hidden` is [batch, n, hidden size].

        Raises:
            UnsupportedError: the attention did not come by.
        """
        slots, mask = tokens.slots if tokens.block is None else tokens.block, tokens.slot_mask
        attention = self._attention.get((needs.ahead, needs.rows or ""))
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
                partial(take, hidden, slots),
                partial(take, hidden, text),
            )
        if needs.keys and projections is not None:
            query, key = projections
            seen.keys, seen.text_keys = partial(take, key, slots), partial(take, key, text)
            seen.queries = partial(take, query, slots)
        if needs.vision:
            self._add_vision(seen, tokens.index)
        if needs.beside is not None:
            seen.beside = self.observation(cut, needs.beside, tokens, hidden)
        return seen

    def _add_vision(self, seen: Observation, visual: torch.Tensor) -> None:
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
            fill = False if rows[0].dtype == torch.bool else float("nan")
            padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=fill)
            stacked[name] = padded.to(self.device)
        return stacked

    def _rows(self, rows: str, tokens: Tokens) -> tuple[torch.Tensor | slice, _Rows]:
        """Where the text rows are in the present sequence, and in the prompt."""
        if rows not in self._text:
            column, mask, are_last = self.layout.text_rows(rows)
            on_device = (to_device(values, self.device) for values in (column, mask))
            self._text[rows] = _Rows(*on_device, are_last, bool(mask.all()))
        text = self._text[rows]
        if text.are_last or tokens.was_cut:
            # A cut pads on the left and drops nothing behind the last visual token.
            end = tokens.width - self.layout.drafts
            return slice(end - text.mask.shape[1], end), text
        return text.column, text

    def _row_mask(
        self, mask: Any, tokens: Tokens, slots: torch.Tensor | slice, device: torch.device
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """`row_mask` on the device of the layer, which may be another than the prompt's."""
        if rows_are_causal(mask, tokens, slots):
            # The same at every cut: nothing behind the first of these rows is ever dropped.
            size = slots.stop - slots.start
            blocked = self._causal.get(size)
            if blocked is None or blocked.device != device:
                blocked, _ = row_mask(mask, tokens, slots)
                blocked = self._causal[size] = blocked.to(device)
            return blocked, None
        blocked, bias = row_mask(mask, tokens, slots)
        return tuple(part if part is None else part.to(device) for part in (blocked, bias))


@dataclass(frozen=True)
class _Rows:
    """The text rows of the prompts.

    column: [batch, rows], theirs in the prompt; mask: bool [batch, rows], False for padding.
    are_last: whether they are the prompt's last columns; all_real: whether none is padding.
    """

    column: torch.Tensor
    mask: torch.Tensor
    are_last: bool
    all_real: bool


def take(states: torch.Tensor, slots: torch.Tensor | slice) -> torch.Tensor:
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
