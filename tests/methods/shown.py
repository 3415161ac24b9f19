"""What a method is shown at a cut, made of random numbers: prompts of different lengths in one batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from autoprune.contract import Observation
from autoprune.engine.tokens.present import length_mask

HIDDEN, HEADS, KEY_HEADS, HEAD_DIM = 12, 4, 2, 6
CPU = torch.device("cpu")


@dataclass
class Shown:
    """The tensors behind an observation."""

    counts: list[int]
    rows: list[int]
    hidden: torch.Tensor
    text_hidden: torch.Tensor
    keys: torch.Tensor
    text_keys: torch.Tensor
    queries: torch.Tensor
    attention: torch.Tensor

    def observation(self, cut: int = 2) -> Observation:
        """As the engine hands it over, with garbage in the padding."""
        mask = length_mask(self.counts, self.hidden.shape[1], CPU)
        index = torch.arange(self.hidden.shape[1]).expand(mask.shape).masked_fill(~mask, -1)
        return Observation(
            cut,
            list(self.counts),
            index,
            mask,
            attention=self.attention,
            text_mask=length_mask(self.rows, self.text_hidden.shape[1], CPU),
            hidden=lambda: self.hidden,
            text_hidden=lambda: self.text_hidden,
            keys=lambda: self.keys,
            text_keys=lambda: self.text_keys,
            queries=lambda: self.queries,
        )

    def alone(self, prompt: int) -> Shown:
        """One prompt of the batch, without padding."""
        one, visual, text = slice(prompt, prompt + 1), self.counts[prompt], self.rows[prompt]
        return Shown(
            [visual],
            [text],
            self.hidden[one, :visual],
            self.text_hidden[one, :text],
            self.keys[one, :, :visual],
            self.text_keys[one, :, :text],
            self.queries[one, :, :visual],
            self.attention[one, :, :text, :visual],
        )


def shown(counts: Sequence[int], rows: Sequence[int], seed: int = 0) -> Shown:
    """Random tensors for prompts with `counts` visual tokens and `rows` text tokens."""
    generator = torch.Generator().manual_seed(seed)
    batch, visual, text = len(counts), max(counts), max(rows)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(batch, *shape, generator=generator)

    return Shown(
        list(counts),
        list(rows),
        hidden=normal(visual, HIDDEN),
        text_hidden=normal(text, HIDDEN),
        keys=normal(KEY_HEADS, visual, HEAD_DIM),
        text_keys=normal(KEY_HEADS, text, HEAD_DIM),
        queries=normal(HEADS, visual, HEAD_DIM),
        attention=normal(HEADS, text, visual).softmax(dim=-1),
    )


def kept_of(selection) -> list[list[int]]:
    """Kept positions of every prompt, without padding."""
    rows = zip(selection.kept.tolist(), selection.counts, strict=True)
    return [row[:count] for row, count in rows]
