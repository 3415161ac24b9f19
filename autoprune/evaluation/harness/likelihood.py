"""How likely a given answer is, with the prompt pruned as it is when the model answers itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import LogitsProcessor, LogitsProcessorList

from ..prompts import tokenizer_of


@dataclass(frozen=True)
class Likelihood:
    """log_probabilities: of each token of the answer. greedy: whether each was the likeliest."""

    log_probabilities: list[float]
    greedy: bool

    @property
    def loss(self) -> float:
        """Mean negative log-likelihood of a token, in nats: the harness takes the lowest as the answer."""
        return -sum(self.log_probabilities) / len(self.log_probabilities)


def answer_tokens(processor: Any, prompt: str, answer: str) -> list[int]:
    """The tokens of `answer` where it stands behind `prompt`.

    Raises:
        ValueError: there are none.
    """
    tokenizer = tokenizer_of(processor)

    def tokens(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False).input_ids)

    before, whole = tokens(prompt), tokens(prompt + answer)
    own = whole[len(before) :] if whole[: len(before)] == before else tokens(answer)
    if not own:
        raise ValueError(f"the answer {answer!r} has no token, so its likelihood is none")
    return own


def likelihoods(model: Any, inputs: Any, answers: Sequence[Sequence[int]]) -> list[Likelihood]:
    """Of one answer for each prompt; a method that is attached prunes the prompt, and not the answer.

    The prompt is prefilled alone and the answer is fed behind it, token by token. In one forward the
    method would see the answer before it decides.

    Args:
        inputs: of a left-padded batch.
        answers: tokens.
    """
    forced = _Forced(answers, inputs["input_ids"].shape[1])
    model.generate(
        **inputs,
        max_new_tokens=max(map(len, answers)),
        do_sample=False,
        num_beams=1,
        repetition_penalty=1.0,
        logits_processor=LogitsProcessorList([forced]),
    )
    return [
        Likelihood([float(step) for step in own], all(greedy))
        for own, greedy in zip(forced.log_probabilities, forced.greedy, strict=True)
    ]


class _Forced(LogitsProcessor):
    """Makes `generate` say the given answers, and notes how likely each token of them was."""

    def __init__(self, answers: Sequence[Sequence[int]], prompt_length: int):
        self._answers, self._start = answers, prompt_length
        self.log_probabilities: list[list[float]] = [[] for _ in answers]
        self.greedy: list[list[bool]] = [[] for _ in answers]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        step = input_ids.shape[1] - self._start
        logs = scores.float().log_softmax(-1)
        said = torch.full_like(scores, -torch.inf)
        for row, answer in enumerate(self._answers):
            # A shorter answer is over; something has to be said beside the longer ones.
            token = answer[min(step, len(answer) - 1)]
            said[row, token] = 0
            if step < len(answer):
                self.log_probabilities[row].append(float(logs[row, token]))
                self.greedy[row].append(int(logs[row].argmax()) == token)
        return said
