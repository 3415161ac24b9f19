"""Where the visual and text tokens of the prompts are, read once from the device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch

from ...contract import LAST_ROWS, MOST_ROWS, Rows
from ...errors import UnsupportedError


@dataclass(frozen=True)
class TextRows:
    """The query rows that may score the prompts' visual tokens, on the host. Padding comes first.

    column: int [batch, rows], their columns; mask: bool [batch, rows], False for padding.
    behind: int [batch, rows], how many tokens of its prompt stand behind each; 0 for padding.
    are_last: whether they are the last columns of the batch's prompts.
    joined: whether they are the last tokens of each prompt, none left out.
    alike: whether those of all prompts stand equally far from the end, and none is padding.
    """

    column: np.ndarray
    mask: np.ndarray
    behind: np.ndarray
    are_last: bool
    joined: bool
    alike: bool

    @classmethod
    def of(cls, found: list[tuple[np.ndarray, np.ndarray]], length: int) -> TextRows:
        """From each prompt's columns and what stands behind them, of `length` columns."""
        width = max(len(columns) for columns, _ in found)
        column = np.zeros((len(found), width), dtype=np.int64)
        behind, mask = column.copy(), column.astype(bool)
        for prompt, (columns, number) in enumerate(found):
            first = width - len(columns)
            column[prompt, first:], behind[prompt, first:] = columns, number
            mask[prompt, first:] = True
        last, end = np.arange(length - width, length), np.arange(width)[::-1]
        return cls(
            column,
            mask,
            behind,
            are_last=bool((np.where(mask, column, last) == last).all()),
            joined=bool((np.where(mask, behind, end) == end).all()),
            alike=bool(mask.all() and (behind == behind[:1]).all()),
        )


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
    def tail(self) -> int:
        """Of the prompt's last columns, how many hold text in every prompt."""
        text = (self.real & ~self.visual)[:, : self.length].all(axis=0)
        return int(text[::-1].argmin()) if not text.all() else self.length

    @property
    def num_visual(self) -> list[int]:
        return self.visual.sum(axis=1).tolist()

    @property
    def num_text(self) -> list[int]:
        return (self.real & ~self.visual)[:, : self.length].sum(axis=1).tolist()

    @cached_property
    def ends_visual(self) -> list[bool]:
        """Which prompts end with a visual token: the one whose logits are asked for."""
        ends = []
        for real, visual in zip(self.real[:, : self.length], self.visual, strict=True):
            columns = np.flatnonzero(real)
            ends.append(bool(columns.size and visual[columns[-1]]))
        return ends

    def text_rows(self, rows: Rows) -> TextRows:
        """The query rows that may score a prompt's visual tokens, as `Needs.rows` says.

        A prompt that ends with its picture is scored by its last token; one without picture by nothing.
        """
        found = []
        for real, visual in zip(self.real, self.visual, strict=True):
            seen, columns = np.flatnonzero(visual), np.flatnonzero(real[: self.length])
            number = 0
            if seen.size:
                after = int((columns > seen[-1]).sum())
                number = 1 if rows == "last" else max(after, 1)
            behind = np.arange(number)[::-1]
            if rows == "text":
                behind = sample_rows(number)
            found.append((columns[len(columns) - 1 - behind], behind))
        return TextRows.of(found, self.length)


def sample_rows(number: int) -> np.ndarray:
    """Which of so many rows are looked at: how far each stands from the last one, falling.

    All of them up to MOST_ROWS. Of more, the last LAST_ROWS, and others evenly spaced before these, from the
    first one on.
    """
    if number <= MOST_ROWS:
        return np.arange(number)[::-1]
    spaced, before = MOST_ROWS - LAST_ROWS, number - LAST_ROWS
    place = np.arange(spaced) * before // spaced
    return number - 1 - np.concatenate([place, np.arange(before, number)])


def read_layout(
    ids: torch.Tensor | None,
    mask: Any,
    shape: Sequence[int],
    visual_ids: tuple[int, ...],
    visual_mask: torch.Tensor | None = None,
    drafts: int = 0,
) -> Layout:
    """Where a prompt's visual tokens and its padding are.

    Args:
        ids, mask: the `input_ids` and `attention_mask` that the model was called with, best `on_host`.
        shape: batch, S, and what may follow.
        visual_ids: token ids that stand for pictures and videos.
        visual_mask: bool [prompts, S], given by the user instead of ids; generation may have
            repeated the prompts since.
        drafts: see `Layout`.

    Raises:
        UnsupportedError: there are neither ids nor a visual mask.
        ValueError: the visual mask does not fit the prompt.
    """
    batch, length = shape[:2]
    if visual_mask is not None:
        if visual_mask.shape[1] != length or batch % visual_mask.shape[0]:
            raise ValueError(
                f"visual_mask has shape {list(visual_mask.shape)} but the prompt is "
                f"[{batch}, {length}]; pass one row per prompt and one column per position"
            )
        repeats = batch // visual_mask.shape[0]
        visual = visual_mask.bool().repeat_interleave(repeats, dim=0).cpu().numpy()
    elif ids is not None:
        visual = np.isin(ids.numpy(force=True), visual_ids)
    else:
        raise UnsupportedError(
            "the model was called with inputs_embeds only, so nothing says which tokens are "
            "visual; pass method(model, visual_mask=...), bool [batch, length]"
        )
    real = _real_tokens(mask, batch, length)
    return Layout(real, visual & real, drafts)


def on_host(ids: torch.Tensor | None, mask: Any) -> tuple[torch.Tensor | None, Any]:
    """Both on the CPU, read from the device at once where their shapes allow it."""
    if ids is None:
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
    return mask[:, -length:].bool().numpy(force=True)
