"""Summaries: of each prompt, one visual token that stands for all that were dropped.

It is the dropped token nearest to the mean of their positions, and takes on the mean of their hidden states. So
positions, masks and caches treat it as any token that is kept; its attention alone counts for more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ...contract import SummaryToken
from ...parts.transfer import all_to_device, to_device
from .present import Tokens


@dataclass(frozen=True)
class Mean:
    """What a cut makes of the summaries.

    weights: [batch, 1, n], the share of each token that stood before the cut.
    rows: LongTensor [summaries], their rows in the new hidden states.
    prompts: LongTensor [summaries], whose they are; None where each prompt has one.
    typical: whether means are scaled to the mean norm of what they are made of.
    """

    weights: torch.Tensor
    rows: torch.Tensor
    prompts: torch.Tensor | None
    typical: bool

    def of(self, hidden: torch.Tensor) -> torch.Tensor:
        """The summaries' hidden states [summaries, size], from those before the cut [batch, n, size]."""
        mean = self.weights.to(hidden.device) @ hidden
        if self.typical:
            norms = torch.linalg.vector_norm(hidden, dim=2, keepdim=True, dtype=torch.float32)
            norm = torch.linalg.vector_norm(mean, dim=2, keepdim=True, dtype=torch.float32)
            wanted = self.weights.to(norms) @ norms
            mean = mean * (wanted / norm.clamp(min=torch.finfo(torch.float32).tiny)).to(mean)
        mean = mean[:, 0]
        return mean if self.prompts is None else mean[self.prompts.to(mean.device)]


@dataclass(frozen=True)
class Standing:
    """The summaries of all prompts at cuts that follow each other.

    here: bool [batch, n], the token of each prompt that is its summary.
    prompts: LongTensor [summaries], those that have one; None for all.
    own, each: float32 [cuts, batch, 1], the share in the summary behind a cut that it had before, and that
        each token has that goes at the cut. 1 and 0 where there is no summary.
    bias: float32 [cuts, batch, 1], what is added to the scores of attention on it; None for nothing.
    dtype: of hidden states.
    """

    here: torch.Tensor
    prompts: torch.Tensor | None
    own: torch.Tensor
    each: torch.Tensor
    bias: torch.Tensor | None
    typical: bool
    dtype: torch.dtype

    def weights(self, dropped: torch.Tensor) -> torch.Tensor:
        """Each token's share in the summary behind each cut, [cuts, batch, n].

        Args:
            dropped: bool [cuts, batch, n], the tokens that go at each cut.
        """
        return torch.where(self.here, self.own, dropped * self.each).to(self.dtype)

    def biases(self, others: torch.Tensor | None) -> torch.Tensor | None:
        """What is added to the scores of attention on each token, [cuts, batch, n]; None for nothing."""
        if self.bias is None:
            return others
        if others is None:
            return self.here * self.bias
        return torch.where(self.here, self.bias, others)

    def rows(self, place: torch.Tensor) -> torch.Tensor:
        """The summaries' rows behind each cut, [cuts, summaries]; `place` [cuts, batch, n] has all tokens'."""
        rows = (place * self.here).sum(dim=2)
        return rows if self.prompts is None else rows[:, self.prompts]


class Summaries:
    """Which token of each prompt is its summary, in one prefill.

    Args:
        form: as the method asks for it.
        num_visual: N of each prompt.
        required: how many tokens of each prompt stay whatever is decided (`Prompts.required`).
    """

    def __init__(self, form: SummaryToken, num_visual: Sequence[int], required: Sequence[int]):
        self.form, self.num_visual = form, np.array(num_visual)
        self.required = np.array(required) if len(required) else np.zeros_like(self.num_visual)
        # LongTensor [batch, 1], where they stand; None until there is any.
        self.column: torch.Tensor | None = None
        # Whether each prompt has one, and whether it had one that gave way; such a prompt gets no other.
        self.has = np.zeros(len(self.num_visual), dtype=bool)
        self.had = np.zeros_like(self.has)
        self._slots: tuple[Tokens, torch.Tensor] | None = None

    def fits(self, counts: np.ndarray) -> np.ndarray:
        """Whether so many visual tokens, [..., batch], leave room for a summary."""
        return counts > self.required

    def missing(
        self, tokens: Tokens, kept: Sequence[int], planned: Sequence[int | None]
    ) -> np.ndarray:
        """bool [batch]: prompts that get a summary at a cut that keeps so many visual tokens beside it.

        Args:
            planned: how many are to enter the next layer, where that is known.
        """
        after, whole = np.array(kept) + 1, np.array(tokens.counts) == self.num_visual
        whole &= [n is None or n > now for n, now in zip(planned, kept, strict=True)]
        return ~self.has & ~self.had & whole & (after < self.num_visual) & self.fits(after)

    def slots(self, tokens: Tokens) -> torch.Tensor | None:
        """bool [batch, V], the summaries among the visual tokens present; None if there are none."""
        if self.column is None or not self.has.any():
            return None
        if self._slots is None or self._slots[0] is not tokens:
            column = tokens.column.gather(1, tokens.slots)
            here = (column == self.column) & tokens.slot_mask
            if not self.has.all():
                here = here & _flags(self.has, here.device)
            self._slots = tokens, here
        return self._slots[1]

    def give_way(self, counts: np.ndarray) -> None:
        """Let summaries become ordinary tokens where cuts to so many, [cuts, batch], leave them no room."""
        out = self.has & ~self.fits(counts).all(axis=0)
        if out.any():
            self.had, self.has, self._slots = self.had | out, self.has & ~out, None

    def lead(self, tokens: Tokens, order: torch.Tensor, counts: np.ndarray) -> torch.Tensor:
        """The visual tokens in the order in which they are kept, with new summaries in front.

        Args:
            order: LongTensor [batch, V], best first; summaries that there are come before all that a cut drops.
            counts: int [cuts, batch], what each prompt keeps.
        """
        roomy = self.fits(counts).all(axis=0)
        whole, fallen = np.array(tokens.counts) == self.num_visual, counts < self.num_visual
        new = ~self.has & ~self.had & roomy & whole & fallen.any(axis=0)
        if not new.any():
            return order
        first = counts[fallen.argmax(axis=0), np.arange(len(new))]
        # The summary takes a slot of its own, so one token more is dropped.
        start, stop = np.where(new, first - 1, 0), np.where(new, self.num_visual, 1)
        place = np.arange(order.shape[1])
        dropped = (place >= start[:, None]) & (place < stop[:, None])
        inside, new_there = all_to_device([dropped, new[:, None]], order.device)
        position = order.float()
        if self.form.position == "last":
            chosen = position.masked_fill(~inside, -1.0).argmax(dim=1, keepdim=True)
        else:
            mean = (position * inside).sum(dim=1, keepdim=True) / inside.sum(dim=1, keepdim=True)
            distance = (position - mean).abs()
            chosen = distance.masked_fill(~inside, float("inf")).argmin(dim=1, keepdim=True)
        summary = order.gather(1, chosen)
        column = tokens.column.gather(1, tokens.slots.gather(1, summary))
        if self.column is not None:
            column = torch.where(new_there, column, self.column)
        self.column, self.has, self._slots = column, self.has | new, None
        # Where it is put in front, those before it move on by one.
        every = tokens.prompts.ascending[: order.shape[1]]
        moved = order.gather(1, torch.where(every <= chosen, every - 1, every).clamp_(min=0))
        led = torch.where(every == 0, summary, moved)
        return led if new.all() else torch.where(new_there, led, order)

    def standing(self, tokens: Tokens, counts: np.ndarray, dtype: torch.dtype) -> Standing | None:
        """The summaries at cuts to so many visual tokens [cuts, batch]; None if there are none.

        Args:
            dtype: of hidden states.
        """
        if self.column is None or not self.has.any():
            return None
        after = np.where(self.has, self.num_visual - counts + 1, 1)
        now = np.where(self.has, self.num_visual - np.array(tokens.counts) + 1, 1)
        before = np.concatenate([now[None], after[:-1]])
        device, strength = tokens.column.device, self.form.strength
        numbers = np.stack([before / after, self.has / after, strength * np.log(after)])
        own, each, bias = to_device(numbers.astype(np.float32)[..., None], device).unbind(0)
        here, prompts = tokens.column == self.column, None
        if not self.has.all():
            flags, prompts = all_to_device([self.has[:, None], np.flatnonzero(self.has)], device)
            here = here & flags
        # Without it, attention needs no mask for a summary.
        added = bias if strength else None
        return Standing(here, prompts, own, each, added, self.form.norm == "typical", dtype)


def _flags(values: np.ndarray, device: torch.device) -> torch.Tensor:
    (flags,) = all_to_device([values[:, None]], device)
    return flags
