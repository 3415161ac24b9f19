"""Unlabelled prompts: a file of them, or a folder of pictures with a list of questions."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from ..evaluation.tasks import Task, embedded_tasks
from ..tiny.questions import EASY, HARD

FIRST_SEED = 1000
"""Seeds of a comparison's questions below it stay clear of what was tuned on."""


def built_in_prompts(count: int, seed: int = 0) -> list[Task]:
    """Questions about drawn shapes, without their answers; each about a picture of its own.

    None of these pictures is in `evaluation.embedded_tasks` with a seed below `FIRST_SEED`.
    """
    kinds = len((*EASY, *HARD))
    tasks = embedded_tasks(-(-count // kinds), seed=FIRST_SEED + seed)[:count]
    return [Task(task.id, "all", task.question, (), task.image) for task in tasks]


def folder_prompts(pictures: Path, questions: Path, count: int) -> list[Task]:
    """Up to `count` pairs of a picture of the folder and a line of the file.

    Every picture gets one question before any gets a second one.

    Raises:
        ValueError: the folder has no picture, or the file no question.
    """
    if not pictures.is_dir():
        raise ValueError(f"there is no folder of pictures {str(pictures)!r}")
    known = Image.registered_extensions()
    found = sorted(path for path in pictures.iterdir() if path.suffix.lower() in known)
    if not found:
        raise ValueError(f"there are no pictures in {str(pictures)!r}")
    try:
        lines = questions.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read the questions {str(questions)!r}: {error}") from error
    asked = list(dict.fromkeys(line.strip() for line in lines if line.strip()))
    if not asked:
        raise ValueError(f"there are no questions in {str(questions)!r}; give one in each line")
    pairs = (
        (turn, place, path, asked[(place + turn) % len(asked)])
        for turn in range(len(asked))
        for place, path in enumerate(found)
    )
    return [
        Task(f"{path.name} {turn}", "all", question, (), path)
        for (turn, _, path, question), _ in zip(pairs, range(count), strict=False)
    ]
