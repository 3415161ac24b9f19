"""Where the visual and text tokens of the prompts are, read once from the device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..errors import UnsupportedError


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

    def text_rows(self, rows: str) -> tuple[np.ndarray, np.ndarray, bool]:
        """The query rows that may score a prompt's visual tokens.

        "text": all text after the last visual token; "last": the prompt's last token. A prompt that
        ends with its picture is scored by its last token; one without picture by nothing.

        Returns:
            Their columns [batch, rows], those of shorter prompts behind padding; bool [batch, rows],
            False for that padding; and whether these are the last columns of the prompt.
        """
        found = self._text_columns(rows)
        width = max(map(len, found))
        column = np.zeros((len(found), width), dtype=np.int64)
        mask = np.zeros(column.shape, dtype=bool)
        for prompt, columns in enumerate(found):
            first = width - len(columns)
            column[prompt, first:], mask[prompt, first:] = columns, True
        last = np.arange(self.length - width, self.length)
        return column, mask, bool((np.where(mask, column, last) == last).all())

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
