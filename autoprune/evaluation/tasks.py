"""Questions to ask: the embedded model's own, or those of a file; and what counts as right."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

_ARTICLES = frozenset({"a", "an", "the"})
# A point or comma inside a number says something, and so do a sign and a point in front of one; elsewhere
# it is punctuation.
_PUNCTUATION = re.compile(
    r"(?<!\d)(?!(?<![^\W_])(?<!\.)(?:-\.?|\.)\d)[^\w\s]|(?<=\d)[^\w\s](?!\d)|_"
)
_MINUS = "\N{MINUS SIGN}"


@dataclass(frozen=True)
class Task:
    """A question about a picture (or the file of one); any of `answers` is right.

    `kind` is the group in which accuracy is averaged, `id` names the question in the predictions. Where
    nobody asks what is right, there are no answers.
    """

    id: str
    kind: str
    question: str
    answers: tuple[str, ...]
    image: Image.Image | Path


def is_right(prediction: str, answers: Sequence[str]) -> bool:
    """Whether a prediction equals one of the answers once both are normalised.

    Case, punctuation (outside numbers), articles and spaces do not count: "The red ring." is "red
    ring", and "-5" is not "5". An answer of nothing but punctuation has to be given as it is. There is
    no credit for part of an answer.
    """
    given = normalised(prediction)
    return any(given == normalised(answer) for answer in answers)


def normalised(text: str) -> str:
    """What is left of an answer to compare: see `is_right`."""
    words = _PUNCTUATION.sub(" ", text.casefold().replace(_MINUS, "-")).split()
    # An answer may be an article and nothing else, such as a letter that was read.
    return " ".join([word for word in words if word not in _ARTICLES] or words) or text.strip()


def picture_digest(task: Task) -> str:
    """What tells a task's picture from others.

    Raises:
        ValueError: its file cannot be read.
    """
    if isinstance(task.image, Image.Image):
        image = task.image
        content = repr((image.mode, image.size, image.getpalette())).encode() + image.tobytes()
    else:
        try:
            content = task.image.read_bytes()
        except OSError as error:
            raise ValueError(f"cannot read the picture {str(task.image)!r}: {error}") from error
    return hashlib.sha256(content).hexdigest()


def embedded_tasks(per_kind: int, kinds: Sequence[str] | None = None, seed: int = 0) -> list[Task]:
    """Held-out questions of the embedded model, each about a scene of its own.

    Args:
        per_kind: questions of each kind.
        kinds: some of `tiny.KINDS`; default: the easy and hard ones.
        seed: which questions; other seeds share no scene.

    Raises:
        ValueError: an unknown kind, or less than one question.
    """
    from .. import tiny

    _check_count(per_kind)
    kinds = tuple(dict.fromkeys((*tiny.EASY, *tiny.HARD) if kinds is None else kinds))
    drawn = tiny.heldout_questions(per_kind * len(kinds), kinds, seed)
    return [
        Task(f"{seed}-{index}", question.kind, question.text, (question.answer,), scene.image)
        for index, (scene, question) in enumerate(drawn)
    ]


def read_tasks(
    path: Path,
    per_kind: int | None = None,
    kinds: Sequence[str] | None = None,
    labelled: bool = True,
) -> list[Task]:
    """Tasks of a file of JSON lines: `image`, `question`, `answer`, and a `kind` if there are several.

    Paths of images are taken relative to the file; `answer` is a string, a number (as it
    is written: 2.50 is not 2.5), or a list of them. The id is the number of the line. Blank lines are
    passed over.

    Args:
        per_kind: take the first so many of each kind; default: all.
        kinds: take these only; default: all.
        labelled: read the answers. If not, they may be missing.

    Raises:
        ValueError: the file is missing or empty, a line is no task (its number and field are named),
            or there is no question of a kind that is asked for.
    """
    if per_kind is not None:
        _check_count(per_kind)
    if kinds is not None and not kinds:
        raise ValueError("there are no kinds to ask: name some, or leave them out for all")
    if not path.is_file():
        raise ValueError(f"there is no task file {str(path)!r}")
    try:
        # Other line ends may stand inside the JSON.
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{str(path)!r} is no text in UTF-8: {error}") from error
    tasks = [
        _task(path, number, line, labelled) for number, line in enumerate(lines, 1) if line.strip()
    ]
    if not tasks:
        raise ValueError(f"there are no tasks in {str(path)!r}; give one JSON object per line")
    found = dict.fromkeys(task.kind for task in tasks)
    for kind in kinds or ():
        if kind not in found:
            raise ValueError(f"{str(path)!r} has no kind {kind!r}; it has {', '.join(found)}")
    return _first_of_each(tasks, per_kind, found if kinds is None else kinds)


def _check_count(per_kind: int) -> None:
    if per_kind < 1:
        raise ValueError(f"questions must be at least 1 of each kind, got {per_kind}")


class _Number(str):
    """A number of a task file, as it is written there."""

    def __repr__(self) -> str:
        return str(self)


def _task(path: Path, number: int, line: str, labelled: bool) -> Task:
    where = f"{path.name}, line {number}"
    try:
        record = json.loads(line, parse_int=_Number, parse_float=_Number)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is no JSON: {error}") from error
    if not isinstance(record, dict):
        raise ValueError(f"{where}: expected an object with image, question and answer")
    image = path.parent / _text(record, "image", where)
    try:
        found = image.is_file()
    except (OSError, ValueError) as error:
        raise ValueError(f"{where}, image: {str(image)[:80]!r} is no path: {error}") from error
    if not found:
        raise ValueError(f"{where}, image: there is no file {str(image)!r}")
    answers = _answers(record, where) if labelled else ()
    kind = _text({"kind": "all", **record}, "kind", where)
    question = _text(record, "question", where)
    return Task(str(number), kind, question, answers, image)


def _answers(record: dict[str, Any], where: str) -> tuple[str, ...]:
    answers = record.get("answer")
    if not isinstance(answers, list):
        answers = [answers]
    if not answers or not all(isinstance(answer, str) and answer.strip() for answer in answers):
        raise ValueError(
            f"{where}, answer: expected a text, a number or a list of them, got {record.get('answer')!r}"
        )
    return tuple(map(str, answers))


def _text(record: dict[str, Any], field: str, where: str) -> str:
    value = record.get(field)
    if not isinstance(value, str) or isinstance(value, _Number) or not value.strip():
        raise ValueError(f"{where}, {field}: expected a text, got {value!r}")
    return value


def _first_of_each(
    tasks: Sequence[Task], per_kind: int | None, kinds: Sequence[str] | dict[str, None]
) -> list[Task]:
    taken: Counter[str] = Counter()
    chosen = []
    for task in tasks:
        if task.kind in kinds and (per_kind is None or taken[task.kind] < per_kind):
            taken[task.kind] += 1
            chosen.append(task)
    return chosen
