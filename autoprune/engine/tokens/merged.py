"""A cut that puts new tokens in the place of dropped ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from ...contract import Merged, Selection
from ...parts.transfer import all_to_device, to_device
from .present import NEW, Tokens, length_mask


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
    ends = [(row, counts[row] - 1, tokens.counts[row] - 1) for row in rows]
    row, place, last = all_to_device(list(np.array(ends).T), kept.device)
    forced = torch.zeros_like(kept, dtype=torch.bool)
    forced = forced.index_put((row, place), kept[row, place] != last)
    kept = kept.index_put((row, place), last)
    return replace(selection, kept=kept, counts=counts, states=states), forced


def cut_and_merge(
    tokens: Tokens, selection: Selection, ends_visual: Sequence[bool] | None = None
) -> tuple[Tokens, torch.Tensor]:
    """The tokens after a cut that makes new ones, and where each comes from.

    Args:
        ends_visual: which prompts end with a visual token, behind which nothing is put; None for none.

    Returns:
        The new tokens, and LongTensor [batch, n'] of sources: places in the old sequence, or
        width + i for new token i. Sources of padding point anywhere.
    """
    merged = selection.merged
    assert merged is not None
    counts = [a + b for a, b in zip(selection.counts, merged.counts, strict=True)]
    lengths = [
        n - old + new for n, old, new in zip(tokens.lengths, tokens.counts, counts, strict=True)
    ]
    kept = selection.kept[:, : max(selection.counts)]
    slots = tokens.slots.gather(1, kept.clamp(min=0)).where(kept >= 0, -1)
    index = tokens.index.gather(1, kept.clamp(min=0))
    place, slot = _places_of_new(tokens, merged, ends_visual)
    # Tokens stand in the order of their keys; padding has none and comes first. New ones get odd keys, or
    # those of the tokens that they replace.
    keys = torch.cat([tokens.text * 2, slots * 2, place], dim=1)
    new = torch.arange(tokens.width, tokens.width + place.shape[1], device=place.device)
    sources = torch.cat([tokens.text, slots, new.expand_as(place)], dim=1)
    keys, ranked = keys.sort(dim=1, stable=True)
    ranked = ranked[:, ranked.shape[1] - max(lengths) :]
    real = keys[:, keys.shape[1] - max(lengths) :] >= 0
    indices = torch.cat([torch.full_like(tokens.text, -1), index, torch.full_like(place, NEW)], 1)
    index = indices.gather(1, ranked).where(real, -1)
    source = sources.gather(1, ranked).clamp(min=0)
    columns = torch.cat([tokens.column, tokens.column.gather(1, slot)], dim=1)
    column = columns.gather(1, source).where(real, -1)
    left = Tokens(tokens.prompts, lengths, counts, column, tokens.heads, was_cut=True)
    return replace(left, index_with_new=index), source


def _places_of_new(
    tokens: Tokens, merged: Merged, ends_visual: Sequence[bool] | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The keys of the new tokens [batch, M], -1 for padding, and the places whose columns they get."""
    slots, device, number = tokens.slots, tokens.slots.device, merged.hidden.shape[1]
    last = to_device([max(n - 1, 0) for n in tokens.counts], device)
    last = slots.gather(1, last[:, None]).expand(-1, number)
    if merged.place is None:
        slot, behind = last, torch.ones_like(last)
    else:
        slot = slots.gather(1, merged.place.clamp(min=0))
        behind = torch.zeros_like(slot)
    if ends_visual is not None:
        # The last token of such a prompt stays the last.
        ends = to_device(list(ends_visual), device)[:, None]
        behind = torch.where(ends & (slot == last), -1, behind)
    real = length_mask(merged.counts, number, device)
    return (slot * 2 + behind).where(real, -1), slot
