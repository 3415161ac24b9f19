"""Where the visual and text tokens of a batch are, and how the batch shrinks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch

from ..errors import UnsupportedError
from ..method import Selection

TEXT, MERGED, PADDING = -1, -2, -3


@dataclass(frozen=True)
class Layout:
    """The prompts of one prefill as they came: S columns, padded left or right.

    real: bool [batch, S], False for padding; visual: bool [batch, S]. Both numpy, on the host.
    drafts: the last columns that are proposed continuations (assisted decoding), not prompt.
    """

    real: np.ndarray
    visual: np.ndarray
    drafts: int = 0

    @property
    def length(self) -> int:
        """Columns of the prompt itself."""
        return self.real.shape[1] - self.drafts

    @property
    def num_visual(self) -> list[int]:
        return self.visual.sum(axis=1).tolist()

    @property
    def num_text(self) -> list[int]:
        return (self.real & ~self.visual)[:, : self.length].sum(axis=1).tolist()

    def text_rows(self, rows: str) -> tuple[np.ndarray, np.ndarray, list[int]]:
        """The query rows that may score a prompt's visual tokens.

        "text": all text after the last visual token; "last": the prompt's last token. A prompt that
        ends with its picture is scored by its last token; one without picture by nothing.

        Returns:
            Their columns [batch, rows]; how many real tokens each prompt has from there on (no cut
            changes that) [batch, rows], 0 for padding; and how many rows each prompt has.
        """
        found = self._text_columns(rows)
        counts = [len(columns) for columns in found]
        column = np.zeros((len(found), max(counts)), dtype=np.int64)
        from_end = np.zeros_like(column)
        behind = self.real[:, ::-1].cumsum(axis=1)[:, ::-1]
        for prompt, columns in enumerate(found):
            column[prompt, : len(columns)] = columns
            from_end[prompt, : len(columns)] = behind[prompt, columns]
        return column, from_end, counts

    def _text_columns(self, rows: str) -> list[np.ndarray]:
        found = []
        for real, visual in zip(self.real, self.visual, strict=True):
            seen = np.flatnonzero(visual)
            if not seen.size:
                found.append(seen)
                continue
            columns = np.flatnonzero(real[: self.length])
            after = columns[columns > seen[-1]]
            found.append(after if rows == "text" and after.size else columns[-1:])
        return found


@dataclass
class Tokens:
    """The tokens present at one depth, padded on the left to a common length n.

    column: LongTensor [batch, n], the column of the prompt each token came from; -1 for padding.
    visual: LongTensor [batch, n], index 0..N-1 of an original visual token, else TEXT, MERGED or PADDING.
    lengths, counts: real tokens and visual tokens of each prompt (host).
    padded: whether any prompt is shorter than n.
    was_cut: whether this is what a cut left; the prompt itself may be padded on the right.
    """

    column: torch.Tensor
    visual: torch.Tensor
    lengths: list[int]
    counts: list[int]
    padded: bool
    was_cut: bool = False

    @classmethod
    def of(cls, layout: Layout, device: torch.device) -> Tokens:
        real, visual = layout.real, layout.visual
        column = np.where(real, np.arange(real.shape[1]), -1)
        index = np.where(visual, visual.cumsum(axis=1) - 1, np.where(real, TEXT, PADDING))
        return cls(
            column=torch.from_numpy(column).to(device),
            visual=torch.from_numpy(index).to(device),
            lengths=real.sum(axis=1).tolist(),
            counts=layout.num_visual,
            padded=not real.all(),
        )

    def without_last(self, drafts: int) -> Tokens:
        """Without the last columns, which are text."""
        if not drafts:
            return self
        end, lengths = self.width - drafts, [n - drafts for n in self.lengths]
        column, visual = self.column[:, :end], self.visual[:, :end]
        return Tokens(column, visual, lengths, self.counts, self.padded, self.was_cut)

    @property
    def width(self) -> int:
        return self.column.shape[1]

    @cached_property
    def is_visual(self) -> torch.Tensor:
        """bool [batch, n]."""
        return (self.visual >= 0) | (self.visual == MERGED)

    @cached_property
    def slots(self) -> torch.Tensor:
        """Positions of the visual tokens in the padded sequence, [batch, max(counts)], ascending.

        Entries beyond a prompt's count are padding and point anywhere.
        """
        order = self.is_visual.to(torch.int8).argsort(dim=1, descending=True, stable=True)
        return order[:, : max(self.counts)]

    @cached_property
    def slot_mask(self) -> torch.Tensor:
        """bool [batch, max(counts)], False beyond a prompt's own count."""
        if min(self.counts) == max(self.counts):
            shape = len(self.counts), self.counts[0]
            return torch.ones(shape, dtype=torch.bool, device=self.column.device)
        return length_mask(self.counts, max(self.counts), self.column.device)

    @property
    def waste(self) -> float:
        """Padding as a share of the real tokens."""
        return len(self.lengths) * self.width / max(sum(self.lengths), 1) - 1

    def after(self, selection: Selection) -> tuple[Tokens, torch.Tensor]:
        """The tokens after a cut, and where each comes from.

        Returns:
            The new tokens, and LongTensor [batch, n'] of sources: positions in this sequence, or
            width + i for merged token i. Sources of padding point anywhere.
        """
        slots, kept, merged = self.slots, selection.kept, selection.merged
        # Even sort keys for columns leave the odd ones for merged tokens that go between two columns.
        key = torch.where(self.is_visual, -1, self.column * 2)
        survivors = slots.gather(1, kept.clamp(min=0))
        key = _scatter_real(key, survivors, self.column.gather(1, survivors) * 2, kept >= 0)
        column, visual = self.column, self.visual
        counts = list(selection.counts)
        if merged is not None:
            extra_key, extra_column = self._place(merged)
            key = torch.cat([key, extra_key], dim=1)
            column = torch.cat([column, extra_column], dim=1)
            visual = torch.cat([visual, torch.full_like(extra_column, MERGED)], dim=1)
            counts = [a + b for a, b in zip(counts, merged.counts, strict=True)]
        lengths = [
            n - old + new for n, old, new in zip(self.lengths, self.counts, counts, strict=True)
        ]
        width = max(lengths)
        source = key.argsort(dim=1, stable=True)[:, key.shape[1] - width :]
        padded = min(lengths) < width
        column, visual = column.gather(1, source), visual.gather(1, source)
        if padded:
            first = width - torch.as_tensor(lengths).to(column.device)
            filler = torch.arange(width, device=column.device) < first[:, None]
            column, visual = column.masked_fill(filler, -1), visual.masked_fill(filler, PADDING)
        return Tokens(column, visual, lengths, counts, padded, was_cut=True), source

    def _place(self, merged) -> tuple[torch.Tensor, torch.Tensor]:
        slots = self.slots
        real = length_mask(merged.counts, merged.hidden.shape[1], slots.device)
        if merged.place is None:
            last = torch.as_tensor([max(n - 1, 0) for n in self.counts]).to(slots.device)
            slot = slots.gather(1, last[:, None]).expand(-1, merged.hidden.shape[1])
            offset = 1
        else:
            slot = slots.gather(1, merged.place.clamp(min=0))
            offset = 0
        column = self.column.gather(1, slot)
        return torch.where(real, column * 2 + offset, -1), column


def _scatter_real(key, index, values, real):
    """Scatter `values` into `key` where `real`; other entries must not overwrite anything."""
    spare = torch.full_like(key[:, :1], -1)
    index = torch.where(real, index, key.shape[1])
    return torch.cat([key, spare], dim=1).scatter(1, index, values)[:, :-1]


def length_mask(lengths: Sequence[int], width: int, device: torch.device) -> torch.Tensor:
    """bool [batch, width]: the first `lengths[b]` entries of row b."""
    limit = torch.as_tensor(list(lengths)).to(device)
    return torch.arange(width, device=device) < limit[:, None]


def read_layout(
    prompt: dict[str, Any],
    embeds: torch.Tensor,
    visual_ids: tuple[int, ...],
    visual_mask: torch.Tensor | None = None,
    drafts: int = 0,
) -> Layout:
    """Where a prompt's visual tokens and its padding are.

    Args:
        prompt: the `input_ids` and `attention_mask` that the model was called with.
        embeds: [batch, S, hidden size].
        visual_ids: token ids that stand for pictures and videos.
        visual_mask: bool [prompts, S], given by the user instead of ids; generation may have
            repeated the prompts since.
        drafts: see `Layout`.

    Raises:
        UnsupportedError: there are neither ids nor a visual mask.
        ValueError: the visual mask does not fit the prompt.
    """
    batch, length = embeds.shape[:2]
    ids, mask = _on_host(prompt["input_ids"], prompt["attention_mask"])
    if visual_mask is not None:
        if visual_mask.shape[1] != length or batch % visual_mask.shape[0]:
            raise ValueError(
                f"visual_mask has shape {list(visual_mask.shape)} but the prompt is "
                f"[{batch}, {length}]; pass one row per prompt and one column per position"
            )
        repeats = batch // visual_mask.shape[0]
        visual = visual_mask.bool().repeat_interleave(repeats, dim=0).cpu().numpy()
    elif ids is not None:
        visual = np.isin(ids.numpy(), visual_ids)
    else:
        raise UnsupportedError(
            "the model was called with inputs_embeds only, so nothing says which tokens are "
            "visual; pass method(model, visual_mask=...), bool [batch, length]"
        )
    real = _real_tokens(mask, batch, length)
    return Layout(real, visual & real, drafts)


def _on_host(ids: torch.Tensor | None, mask: Any) -> tuple[torch.Tensor | None, Any]:
    """Both on the CPU, read from the device at once where that is possible."""
    if ids is None or ids.device.type == "cpu":
        return ids, mask
    if isinstance(mask, torch.Tensor) and mask.shape == ids.shape:
        ids, mask = torch.stack([ids, mask.to(ids)]).cpu()
        return ids, mask
    return ids.cpu(), mask


def _real_tokens(mask: Any, batch: int, length: int) -> np.ndarray:
    """bool [batch, length], False for padding, from a 2-D mask, a 4-D mask's last row, or none.

    Some families prepare one 4-D mask per type of layer before they are called.
    """
    if isinstance(mask, dict):
        mask = mask.get("full_attention")
    if not isinstance(mask, torch.Tensor):
        return np.ones((batch, length), dtype=bool)
    if mask.ndim == 4:
        mask = mask[:, 0, -1, :length]
        mask = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
        mask = mask.expand(batch, -1)
    return mask[:, -length:].bool().cpu().numpy()
