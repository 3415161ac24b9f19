"""What a cut leaves of the tokens that were present."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from ...contract import Merged, Selection
from ...parts.transfer import all_to_device, to_device
from .present import MERGED, Arrangement, Tokens, length_mask


def with_last_tokens(
    tokens: Tokens, selection: Selection, ends_visual: Sequence[bool]
) -> tuple[Selection, torch.Tensor | None]:
    """The same selection with the last token of every prompt that ends with its picture.

    It takes the place of the kept token that stands last, or is kept where none is.

    Returns:
        The selection, and bool [batch, K]: which kept tokens stay as they are, whatever `states` says; None
        if the selection is as it was.
    """
    rows = [row for row, ends in enumerate(ends_visual) if ends]
    if not rows:
        return selection, None
    counts = [max(n, int(ends)) for n, ends in zip(selection.counts, ends_visual, strict=True)]
    kept, states = selection.kept, selection.states
    if (missing := max(counts) - kept.shape[1]) > 0:
        kept = torch.nn.functional.pad(kept, (0, missing), value=-1)
    if states is not None and states.shape[1] < kept.shape[1]:
        states = torch.nn.functional.pad(states, (0, 0, 0, kept.shape[1] - states.shape[1]))
    # Kept positions ascend, so that the last token can only be the last of them.
    place = [counts[row] - 1 for row in rows]
    last = [tokens.counts[row] - 1 for row in rows]
    row, place, last = all_to_device([np.array(n) for n in (rows, place, last)], kept.device)
    forced = torch.zeros_like(kept, dtype=torch.bool)
    forced = forced.index_put((row, place), kept[row, place] != last)
    kept = kept.index_put((row, place), last)
    return replace(selection, kept=kept, counts=counts, states=states), forced


def cut(
    tokens: Tokens, selection: Selection, ends_visual: Sequence[bool] | None = None
) -> tuple[Tokens, torch.Tensor]:
    """The tokens after a cut, and where each comes from.

    Args:
        ends_visual: which prompts end with a visual token, behind which nothing is put; None for none.

    Returns:
        The new tokens, and LongTensor [batch, n'] of sources: places in the old sequence, or
        width + i for merged token i. Sources of padding point anywhere.
    """
    counts = list(selection.counts)
    kept = selection.kept
    if kept.shape[1] > max(counts):
        kept = kept[:, : max(counts)]
    if selection.merged is None and tokens.places is None:
        if tokens.block is not None and min(counts) == max(counts):
            return _cut_block(tokens, kept, counts)
        return _cut_pieces(tokens, kept, counts)
    if min(counts) < max(counts):
        mask = kept >= 0
        kept = kept.clamp(min=0)
        visual = tokens.slots.gather(1, kept).where(mask, -1)
        index = tokens.index.gather(1, kept).where(mask, -1)
    else:
        visual, index = tokens.slots.gather(1, kept), tokens.index.gather(1, kept)
    # Each token's place is its key: sorting puts padding in front and the rest in order.
    keys, sources, column = torch.cat([tokens.text, visual], dim=1), None, tokens.column
    if (merged := selection.merged) is not None:
        counts = [a + b for a, b in zip(counts, merged.counts, strict=True)]
        keys, sources, index, column = _with_merged(
            tokens, merged, max(counts), visual, index, ends_visual
        )
    lengths = [
        n - old + new for n, old, new in zip(tokens.lengths, tokens.counts, counts, strict=True)
    ]
    width = max(lengths)
    padded, surplus = min(lengths) < width, keys.shape[1] - width
    source, ranked = keys.sort(dim=1, stable=True)
    # Where each went: the inverse of the ranking.
    order = torch.arange(keys.shape[1], device=keys.device)
    went = torch.empty_like(ranked).scatter_(1, ranked, order.expand_as(ranked))
    if sources is not None:
        source = sources.gather(1, ranked)
    if surplus:
        source, went = source[:, surplus:], went - surplus
    text, slots = went.split([went.shape[1] - index.shape[1], index.shape[1]], dim=1)
    if padded:
        real = source >= 0
        source = source.clamp(min=0)
        column = column.gather(1, source).where(real, -1)
        text = text.where(tokens.text >= 0, -1)
    else:
        column = column.gather(1, source)
    heads, places = tokens.heads, None
    if heads is None:
        places = text, slots.clamp(min=0) if min(counts) < max(counts) else slots
    has_merged = tokens.merged or merged is not None
    new = Tokens(column, index, order[None], lengths, counts, heads, places, True, has_merged)
    return new, source


def _cut_block(
    tokens: Tokens, kept: torch.Tensor, counts: list[int]
) -> tuple[Tokens, torch.Tensor]:
    """`cut`, where only places of one block are dropped, equally many in all prompts."""
    assert tokens.block is not None
    start, stop = tokens.block.start, tokens.block.stop
    head, tail = tokens.ascending[:, :start], tokens.ascending[:, stop : tokens.width]
    if (batch := len(tokens.column)) > 1:
        head, tail = head.expand(batch, -1), tail.expand(batch, -1)
    source = torch.cat([head, kept + start, tail], dim=1)
    dropped = tokens.counts[0] - counts[0]
    new = Tokens(
        column=tokens.column.gather(1, source),
        index=tokens.index.gather(1, kept),
        ascending=tokens.ascending,
        lengths=[n - dropped for n in tokens.lengths],
        counts=counts,
        heads=tokens.heads,
        was_cut=True,
        merged=tokens.merged,
    )
    return new, source


def _cut_pieces(
    tokens: Tokens, kept: torch.Tensor, counts: list[int]
) -> tuple[Tokens, torch.Tensor]:
    """`cut`, where the visual tokens of every prompt are in one piece and nothing is merged.

    All but the kept places is known on the host.
    """
    heads, lengths, old = tokens.geometry
    number = np.array(counts)[:, None]
    left = lengths - old + number
    width = int(left.max())
    arrangement = Arrangement.on_host(width, heads, left, number)
    slots, slot_mask = arrangement[:2]
    place = np.arange(width) - (width - left)
    before = np.where(place < heads, place, place + (old - number)) + (tokens.width - lengths)
    before[place < 0] = 0
    # Of a visual token, where its piece begins: the kept place is added to it.
    rows = (slots + width * np.arange(len(old))[:, None])[slot_mask]
    before.flat[rows] = np.repeat(tokens.width - lengths + heads, counts)
    arrays = [before.ravel(), rows, np.flatnonzero(slot_mask), place < 0, *arrangement]
    source, rows, chosen, padding, *arranged = all_to_device(arrays, tokens.column.device)
    source.index_add_(0, rows, kept.flatten().index_select(0, chosen))
    source = source.view(padding.shape)
    column = tokens.column.gather(1, source)
    index = tokens.index.gather(1, kept.clamp(min=0))
    new = Tokens(
        column=column.masked_fill(padding, -1) if left.min() < width else column,
        index=index.where(arranged[1], -1) if number.min() < number.max() else index,
        ascending=tokens.ascending,
        lengths=left[:, 0].tolist(),
        counts=counts,
        heads=tokens.heads,
        was_cut=True,
        merged=tokens.merged,
        arranged=Arrangement(*arranged),
    )
    return new, source


def _with_merged(
    tokens: Tokens, merged: Merged, most: int, visual, index, ends_visual: Sequence[bool] | None
):
    """Sort keys, sources, visual index and columns once merged tokens join the kept ones.

    Keys are twice the places: the odd ones are for merged tokens that go between two tokens.
    """
    slots, device = tokens.slots, tokens.slots.device
    number = merged.hidden.shape[1]
    real = length_mask(merged.counts, number, device)
    last = to_device([max(n - 1, 0) for n in tokens.counts], device)
    last = slots.gather(1, last[:, None]).expand(-1, number)
    if merged.place is None:
        slot, behind = last, 1
    else:
        slot, behind = slots.gather(1, merged.place.clamp(min=0)), 0
    if ends_visual is not None:
        # The last token of such a prompt stays the last.
        ends = to_device(list(ends_visual), device)[:, None]
        behind = torch.where(ends & (slot == last), -1, behind)
    extra = torch.arange(tokens.width, tokens.width + number, device=device).expand_as(slot)
    # Kept and merged tokens in their order, padding last.
    key = torch.cat([visual * 2, (slot * 2 + behind).where(real, -1)], dim=1)
    order = key.where(key >= 0, 2 * tokens.width + 2).argsort(dim=1, stable=True)[:, :most]
    key = key.gather(1, order)
    joined = torch.cat([index, torch.full_like(slot, MERGED).where(real, -1)], dim=1)
    source = torch.cat([visual, extra], dim=1).gather(1, order).where(key >= 0, -1)
    return (
        torch.cat([tokens.text * 2, key], dim=1),
        torch.cat([tokens.text, source], dim=1),
        joined.gather(1, order),
        torch.cat([tokens.column, tokens.column.gather(1, slot)], dim=1),
    )
