"""Tasks as model inputs: chat template, processor, left padding, prepared once for all settings."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from PIL import Image

from ..images import load_image
from .encoding import Encode
from .prompts import Conversation, can_pad, tokenizer_of
from .prompts import encode as encode_prompts
from .tasks import Task

PREPARED_BYTES = 4 * 2**30
"""Inputs up to this size are kept; those beyond are prepared again for every setting."""
ROOM = 2
"""New tokens beyond the longest right answer: running on is a mistake, too."""


@dataclass(frozen=True)
class Batch:
    """Tasks that are asked together.

    inputs: gives the model's inputs, encoded where that was asked for.
    pixels: gives them as the processor makes them.
    """

    tasks: Sequence[Task]
    inputs: Callable[[], Any]
    pixels: Callable[[], Any]


def prepare(
    model: Any,
    processor: Any,
    tasks: Sequence[Task],
    batch_size: int,
    on_progress: Callable[[int], None] = lambda prepared: None,
    encode: Encode | None = None,
    by_length: bool = True,
) -> list[Batch]:
    """Batches of tasks with prompts of similar length; one by one where the tokenizer cannot pad.

    Args:
        by_length: if not, the tasks stay in their order. A budget that a batch shares is of little use among
            questions that are alike, as those of one length are.
        on_progress: called with the number of tasks in each batch that is ready.
        encode: makes features of the pixels of what is kept.

    Raises:
        ValueError: a picture that cannot be read, or a batch size below 1.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if not can_pad(processor):
        batch_size = 1
    order = list(range(len(tasks)))
    if by_length:
        lengths = [_length(processor, task) for task in tasks]
        order.sort(key=lengths.__getitem__)
    batches, room = [], PREPARED_BYTES
    for start in range(0, len(tasks), batch_size):
        chosen = [tasks[index] for index in order[start : start + batch_size]]
        again = partial(_encode, model, processor, chosen)
        if room > 0:
            inputs = encode(again()) if encode else again()
            room -= _bytes(inputs)
            batches.append(Batch(chosen, _given(inputs), again if encode else _given(inputs)))
        else:
            batches.append(Batch(chosen, again, again))
        on_progress(len(chosen))
    return batches


def longest_answer(processor: Any, tasks: Sequence[Task]) -> int:
    """New tokens that the longest right answer takes, and `ROOM`."""
    tokenizer = tokenizer_of(processor)
    answers = {answer for task in tasks for answer in task.answers}
    return ROOM + max(
        len(tokenizer(answer, add_special_tokens=False).input_ids) for answer in answers
    )


def _given(inputs: Any) -> Callable[[], Any]:
    return lambda: inputs


def _bytes(values: Any) -> int:
    """Size of all tensors in nested mappings and lists."""
    if torch.is_tensor(values):
        return values.numel() * values.element_size()
    if isinstance(values, Mapping):
        return sum(_bytes(value) for value in values.values())
    return sum(map(_bytes, values)) if isinstance(values, (list, tuple)) else 0


def _length(processor: Any, task: Task) -> int:
    return len(tokenizer_of(processor)(task.question, add_special_tokens=False).input_ids)


def _encode(model: Any, processor: Any, tasks: Sequence[Task]) -> Any:
    """Inputs of a left-padded batch on the model's device."""
    inputs = encode_prompts(processor, [_conversation(task) for task in tasks])
    return inputs.to(model.device).to(model.dtype)


def _conversation(task: Task) -> Conversation:
    content = [{"type": "image"}, {"type": "text", "text": task.question}]
    return Conversation([{"role": "user", "content": content}], [_picture(task)])


def _picture(task: Task) -> Image.Image:
    return task.image if isinstance(task.image, Image.Image) else load_image(task.image)
