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
    sizes = selection.sizes
    if sizes is not None:
        # Such a token takes none in.
        missing = max(kept.shape[1] - sizes.shape[1], 0)
        sizes = torch.nn.functional.pad(sizes, (0, missing), value=1.0)
        sizes = sizes.masked_fill(
            torch.nn.functional.pad(forced, (0, sizes.shape[1] - forced.shape[1])), 1.0
        )
    return replace(selection, kept=kept, counts=counts, states=states, sizes=sizes), forced


def with_sizes(tokens: Tokens, selection: Selection) -> Tokens:
    """The present tokens, of which those that are kept have the sizes that the selection gives them."""
    sizes = selection.sizes
    if sizes is None:
        return tokens
    kept = selection.kept[:, : max(selection.counts)]
    own = sizes[:, : kept.shape[1]].to(kept.device, torch.float32).log()
    # A place more takes padding.
    visual = own.new_zeros(tokens.batch, tokens.slots.shape[1] + 1)
    visual.scatter_(1, kept.where(kept >= 0, visual.shape[1] - 1), own)
    bias = tokens.spread(visual[:, :-1], torch.zeros_like(tokens.column, dtype=torch.float32))
    return replace(tokens, bias=bias)


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
    merged, tokens = selection.merged, with_sizes(tokens, selection)
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
    bias = _biases(tokens, merged, source, real)
    return replace(left, index_with_new=index, bias=bias), source


def _biases(
    tokens: Tokens, merged: Merged, source: torch.Tensor, real: torch.Tensor
) -> torch.Tensor | None:
    """`Tokens.bias` behind the cut, from that before it and the sizes of the new tokens."""
    if tokens.bias is None and merged.sizes is None:
        return None
    old = tokens.bias
    if old is None:
        old = torch.zeros_like(tokens.column, dtype=torch.float32)
    new = old.new_zeros(merged.hidden.shape[:2])
    if merged.sizes is not None:
        new = merged.sizes.to(new).log()
    return torch.cat([old, new], dim=1).gather(1, source).where(real, 0.0)


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
