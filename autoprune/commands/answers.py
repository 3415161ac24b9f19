"""The model's answer to a question, plain or pruned, and how long it took."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
from transformers.generation import BaseStreamer

from ..loading import Loaded
from ..methods.base import Method
from ..trace import Sample


@dataclass(frozen=True)
class Answer:
    """A greedy answer, and the seconds from the prepared inputs to its first token and to its end."""

    text: str
    first_token_seconds: float
    seconds: float


@torch.inference_mode()
def answer(loaded: Loaded, inputs: Any, max_new_tokens: int) -> Answer:
    """The model's greedy answer, timed; the vision tower's part is in the time, too."""
    clock = _Clock()
    ids = loaded.model.generate(
        **inputs, max_new_tokens=max_new_tokens, do_sample=False, num_beams=1, streamer=clock
    )
    new = ids[:, inputs["input_ids"].shape[1] :]
    text = str(loaded.processor.batch_decode(new, skip_special_tokens=True)[0]).strip()
    return Answer(text, clock.first_token, clock.end_of_answer)


def answer_pruned(
    loaded: Loaded, inputs: Any, method: Method, max_new_tokens: int
) -> tuple[Answer, Sample]:
    """The greedy answer with `method` pruning the prompt, and the prompt's record."""
    with method(loaded.model) as trace:
        given = answer(loaded, inputs, max_new_tokens)
    return given, trace.samples[0]


class _Clock(BaseStreamer):
    """Notes when `generate` hands out its tokens; it does so from the device, so they are ready then."""

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self._handed_out = 0
        self.first_token = self.end_of_answer = 0.0

    def put(self, value: Any) -> None:
        # The prompt is handed out first.
        self._handed_out += 1
        if self._handed_out == 2:
            self.first_token = time.perf_counter() - self._start

    def end(self) -> None:
        self.end_of_answer = time.perf_counter() - self._start
