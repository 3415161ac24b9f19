"""The table of formats, and the score of a file of answers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..tasks import normalised
from . import captions, gqa, mme, pope, scienceqa, textvqa, vqa
from .figures import Figure, Score, mean
from .matching import Key, Matched, Question, match
from .reading import Answer, read_answers
from .sources import Sources


def _by_id(answer: Answer) -> list[Key]:
    return [(answer.id,)]


@dataclass(frozen=True)
class Format:
    """How one data set is scored.

    annotations: what the data set's own file or folder is. read: its questions. keys: what an answer is found
    by. figures: what the answers amount to; the texts are those of the questions, None where one is missing.
    question_file: whether LLaVA's file of questions tells something more.
    """

    annotations: str
    read: Callable[[Sources], list[Question]]
    figures: Callable[[Sequence[Question], Sequence[str | None]], Score]
    keys: Callable[[Answer], Sequence[Key]] = _by_id
    question_file: bool = False


FORMATS = {
    "textvqa": Format("TextVQA_0.5.1_val.json", textvqa.read, textvqa.figures, textvqa.keys),
    "vqav2": Format("v2_mscoco_val2014_annotations.json", vqa.read_vqav2, vqa.vqav2),
    "vizwiz": Format("val.json", vqa.read_vizwiz, vqa.vizwiz, question_file=True),
    "gqa": Format("testdev_balanced_questions.json", gqa.read, gqa.figures),
    "pope": Format("the folder of coco_pope_*.json", pope.read, pope.figures, question_file=True),
    "mme": Format("the folder MME_Benchmark_release_version", mme.read, mme.figures, mme.keys),
    "scienceqa": Format("the folder of problems.json", scienceqa.read, scienceqa.figures),
    "coco-caption": Format("captions_val2014.json", captions.read, captions.figures, captions.keys),
}


@dataclass(frozen=True)
class Scored:
    """The score of a file of answers.

    agreement: the share of questions to which another file gives the same text, once case, punctuation
    outside numbers, articles and spaces are normalised. missing: questions without an answer, which count as
    wrong. left_out: how many there were instead, if they were left out. unknown: ids of answers that belong
    to no question. empty: how many answers say nothing.
    """

    figures: list[Figure]
    agreement: Figure | None
    questions: int
    missing: list[str]
    left_out: int
    unknown: list[str]
    empty: int
    notes: list[str]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return dataclasses.asdict(self)


def score(
    name: str,
    answers_file: Path,
    sources: Sources,
    against: Path | None = None,
    answered_only: bool = False,
) -> Scored:
    """Score a file of answers as the data set's own evaluation does.

    Args:
        name: one of `FORMATS`.
        answers_file: JSON lines in LLaVA's form.
        against: another such file, whose answers are compared with these.
        answered_only: leave out questions that have no answer, rather than count them as wrong.

    Raises:
        ValueError: an unknown format, a file that is missing or of another form, a question that is answered
            twice, or not one answer to the annotations' questions.
        ImportError: a format needs an extra that is not installed.
    """
    form = _format(name)
    if sources.question_file is not None and not form.question_file:
        readers = " and ".join(key for key, other in FORMATS.items() if other.question_file)
        raise ValueError(f"{name} reads no question file, only {readers} do; leave it out")
    questions = form.read(sources)
    if not questions:
        raise ValueError(f"there are no questions in {str(sources.annotations)!r}")
    found = _matched(form, questions, answers_file)
    missing = found.missing
    kept = found.answered() if answered_only else found
    figures, notes = form.figures(kept.questions, kept.texts)
    agreement = None
    if against is not None:
        agreement = _agreement(kept, _matched(form, kept.questions, against), against)
    return Scored(
        figures,
        agreement,
        len(kept.questions),
        [] if answered_only else missing,
        len(missing) if answered_only else 0,
        found.unknown,
        sum(text is not None and not text.strip() for text in kept.texts),
        notes,
    )


def _format(name: str) -> Format:
    if name not in FORMATS:
        raise ValueError(f"there is no format {name!r}; choose one of {', '.join(FORMATS)}")
    return FORMATS[name]


def _matched(form: Format, questions: Sequence[Question], answers_file: Path) -> Matched:
    found = match(questions, read_answers(answers_file), form.keys)
    if len(found.missing) == len(questions):
        raise ValueError(
            f"no answer of {str(answers_file)!r} belongs to a question of the annotations: they ask for "
            f"{questions[0].name!r}, and the first answer is to {found.unknown[0]!r}; check that both are of "
            "the same data set and split"
        )
    return found


def _agreement(own: Matched, other: Matched, path: Path) -> Figure:
    if other.missing:
        raise ValueError(
            f"{str(path)!r} has no answer to {len(other.missing)} of the {len(own.questions)} questions, such "
            f"as {other.missing[0]!r}; agreement needs all of them"
        )
    same = [
        float(text is not None and normalised(text) == normalised(their or ""))
        for text, their in zip(own.texts, other.texts, strict=True)
    ]
    return mean("agreement", same)
