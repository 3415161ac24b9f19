"""Which answer belongs to which question."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from .reading import Answer

Key = tuple[str, ...]


@dataclass(frozen=True)
class Question:
    """A question of the annotations.

    key: what its answer is found by, such as its id. truth: what is right, in the form that the format's
    scorer reads. groups: parts of the data set that it counts in, beside the whole.
    """

    key: Key
    truth: Any
    groups: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """How messages call it."""
        return " ".join(self.key)


@dataclass(frozen=True)
class Matched:
    """The answer of every question, in the order of the annotations; None where there is none.

    unknown: ids of answers to questions that the annotations do not have.
    """

    questions: list[Question]
    texts: list[str | None]
    unknown: list[str]

    @property
    def missing(self) -> list[str]:
        """The names of the questions without an answer."""
        pairs = zip(self.questions, self.texts, strict=True)
        return [question.name for question, text in pairs if text is None]

    def answered(self) -> Matched:
        """Only the questions that have an answer."""
        chosen = [index for index, text in enumerate(self.texts) if text is not None]
        return Matched(
            [self.questions[i] for i in chosen], [self.texts[i] for i in chosen], self.unknown
        )


def match(
    questions: Sequence[Question],
    answers: Sequence[Answer],
    keys: Callable[[Answer], Sequence[Key]],
) -> Matched:
    """Give every question its answer.

    Questions that cannot be told apart take their answers in the order of both files.

    Args:
        keys: the keys that an answer may have, the likeliest first.

    Raises:
        ValueError: a question is answered more than once; the lines are named.
    """
    open_questions: dict[Key, list[int]] = defaultdict(list)
    for index, question in enumerate(questions):
        open_questions[question.key].append(index)
    lines: dict[Key, list[int]] = defaultdict(list)
    texts: list[str | None] = [None] * len(questions)
    unknown = []
    for answer in answers:
        key = next((key for key in keys(answer) if key in open_questions), None)
        if key is None:
            unknown.append(answer.id)
            continue
        place = len(lines[key])
        lines[key].append(answer.line)
        if place == len(open_questions[key]):
            told = ", ".join(map(str, lines[key]))
            raise ValueError(
                f"question {' '.join(key)} is answered more than once (lines {told}); keep one answer"
            )
        texts[open_questions[key][place]] = answer.text
    return Matched(list(questions), texts, unknown)
