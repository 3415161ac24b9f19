"""Batches for the decoder: one picture, many questions about it as independent blocks of text."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from autoprune.tiny.questions import EASY, HARD, KINDS, Objects, Question, ask

IGNORE = -100
SINGLE_LENGTH = 12
LONG_LENGTH = 48
# How often a kind is asked, before the trainer shifts weight to the kinds that lag behind.
KIND_WEIGHTS = {
    "colour": 1.0,
    "shape": 1.0,
    "digit": 3.0,
    "exists": 1.5,
    "count": 3.0,
    "relation": 12.0,
    "compare": 3.0,
    "sign": 3.0,
    "sum": 4.0,
    "where": 3.0,
    "side": 6.0,
}
# Weight of one answer's tokens: `sum`, `digit` and `sign` can be asked once per picture only.
_LOSS_WEIGHTS = {"sum": 3.0, "digit": 1.5, "sign": 1.5, "where": 0.5, "describe": 0.6}


@dataclass(frozen=True)
class Layout:
    """How many blocks of text follow a picture.

    singles : blocks with one question each
    longs : blocks with several turns, or with a description
    """

    singles: int = 18
    longs: int = 2

    @property
    def blocks(self) -> tuple[tuple[int, int], ...]:
        """(blocks, tokens per block) of the two groups, in sequence order."""
        return (self.singles, SINGLE_LENGTH), (self.longs, LONG_LENGTH)

    @property
    def text_tokens(self) -> int:
        """Text tokens of one picture, padding included."""
        return sum(blocks * length for blocks, length in self.blocks)


@dataclass
class Lesson:
    """Text of a batch: `ids`, `targets` (IGNORE off the answers), `weights`, `answers`; all
    [batch, text tokens]. `answers` numbers the answer that a target belongs to, -1 elsewhere;
    `kinds` lists each answer's kind."""

    ids: Tensor
    targets: Tensor
    weights: Tensor
    answers: Tensor
    kinds: list[str]

    @property
    def on_answers(self) -> Tensor:
        """Positions that predict a token of an answer, bool [batch, text tokens]."""
        return self.targets != IGNORE


class Teacher:
    """Draws questions about scenes and lays them out as lessons."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, layout: Layout) -> None:
        self.layout = layout
        self.pad, self.eos = tokenizer.pad_token_id, tokenizer.eos_token_id
        self.user, self.assistant = tokenizer.convert_tokens_to_ids(["<|user|>", "<|assistant|>"])

        @lru_cache(maxsize=100_000)
        def encode(text: str) -> tuple[int, ...]:
            return tuple(tokenizer(f" {text}", add_special_tokens=False).input_ids)

        self._encode = encode

    def lesson(
        self, scenes: list[Objects], rng: random.Random, weights: Mapping[str, float]
    ) -> Lesson:
        """One row per scene, filled with questions drawn by the kinds' weights."""
        size = (len(scenes), self.layout.text_tokens)
        lesson = Lesson(
            ids=torch.full(size, self.pad),
            targets=torch.full(size, IGNORE),
            weights=torch.zeros(size),
            answers=torch.full(size, -1),
            kinds=[],
        )
        for row, objects in enumerate(scenes):
            start = 0
            singles = draw_questions(objects, rng, weights, self.layout.singles)
            for question in singles:
                self._write(lesson, row, start, [question], SINGLE_LENGTH)
                start += SINGLE_LENGTH
            start = self.layout.singles * SINGLE_LENGTH
            for _ in range(self.layout.longs):
                self._write(lesson, row, start, self._turns(objects, rng, weights), LONG_LENGTH)
                start += LONG_LENGTH
        return lesson

    def _turns(
        self, objects: Objects, rng: random.Random, weights: Mapping[str, float]
    ) -> list[Question]:
        """A description, or several turns on one picture."""
        described = ask(objects, rng, ["describe"]) if rng.random() < 0.6 else []
        return described or draw_questions(objects, rng, weights, 4)

    def _write(
        self, lesson: Lesson, row: int, start: int, turns: list[Question], room: int
    ) -> None:
        """Lay turns from `start` on; a turn that does not fit into `room` tokens is left out."""
        used = 0
        for index, question in enumerate(turns):
            asked = ([self.user] if index else []) + [*self._encode(question.text), self.assistant]
            answer = [*self._encode(question.answer), self.eos]
            # The last token of a block is a target only: nothing follows it.
            if used + len(asked) + len(answer) - 1 > room:
                return
            begin = start + used
            tokens = asked + answer
            stop = min(begin + len(tokens), start + room)
            lesson.ids[row, begin:stop] = torch.tensor(tokens[: stop - begin])
            first = begin + len(asked) - 1
            span = slice(first, first + len(answer))
            lesson.targets[row, span] = torch.tensor(answer)
            lesson.weights[row, span] = _LOSS_WEIGHTS.get(question.kind, 1.0)
            lesson.weights[row, first + len(answer) - 1] = 0.1
            lesson.answers[row, span] = len(lesson.kinds)
            lesson.kinds.append(question.kind)
            used += len(tokens)


def draw_questions(
    objects: Objects, rng: random.Random, weights: Mapping[str, float], count: int
) -> list[Question]:
    """Up to `count` different questions about a scene, their kinds drawn by weight."""
    kinds = list(weights)
    shares = list(weights.values())
    found: dict[str, Question] = {}
    for kind in rng.choices(kinds, shares, k=4 * count):
        for question in ask(objects, rng, [kind]):
            found.setdefault(question.text, question)
        if len(found) == count:
            break
    return list(found.values())


def reweigh(accuracy: Mapping[str, float]) -> dict[str, float]:
    """Kind weights shifted towards the kinds with low held-out accuracy."""
    floor = {kind: 0.2 if kind in EASY else 0.3 if kind in HARD else 0.2 for kind in KINDS}
    return {
        kind: weight * max(1 - accuracy.get(kind, 0.0), floor[kind])
        for kind, weight in KIND_WEIGHTS.items()
    }
