"""Prompts that were prepared one by one, as one batch."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import torch

from .prompt import Prompt


def batch_kind(prompt: Prompt) -> Hashable:
    """Prompts of one kind can share a batch: their pictures have tensors of the same sizes, but for the first
    dimension. Prompts without a picture go with all of one kind.
    """
    return tuple(
        (name, tuple(value.shape[1:]), value.dtype)
        for name, value in sorted(prompt.inputs.items())
        if not _follows_tokens(name, value, prompt)
    )


def collate(prompts: Sequence[Prompt], pad_id: int) -> dict[str, torch.Tensor]:
    """The inputs of a batch, padded on the left.

    Args:
        prompts: of one kind (`batch_kind`), or without a picture.
        pad_id: token that fills up; the attention mask hides it.
    """
    longest = max(prompt.length for prompt in prompts)
    names = {name: None for prompt in prompts for name in prompt.inputs}
    batch = {}
    for name in names:
        values = [(prompt, prompt.inputs.get(name)) for prompt in prompts]
        if any(
            value is not None and _follows_tokens(name, value, prompt) for prompt, value in values
        ):
            fill = pad_id if name == "input_ids" else 0
            rows = [_row(prompt, value, longest, fill) for prompt, value in values]
            batch[name] = torch.cat(rows)
        else:
            batch[name] = torch.cat([value for _, value in values if value is not None])
    return batch


def to_device(inputs: dict[str, torch.Tensor], model: Any) -> dict[str, torch.Tensor]:
    """On the model's device; numbers with a fraction in its dtype."""
    return {
        name: value.to(model.device, model.dtype if value.is_floating_point() else value.dtype)
        for name, value in inputs.items()
    }


def _follows_tokens(name: str, value: torch.Tensor, prompt: Prompt) -> bool:
    """Whether the tensor has one entry for each token of the prompt."""
    return "pixel" not in name and tuple(value.shape) == (1, prompt.length)


def _row(prompt: Prompt, value: torch.Tensor | None, longest: int, fill: int) -> torch.Tensor:
    """[1, longest]; a prompt that lacks the tensor has zeros, as for text."""
    if value is None:
        return torch.zeros(1, longest, dtype=torch.long)
    return torch.nn.functional.pad(value, (longest - prompt.length, 0), value=fill)
