"""POPE: is an object there, as LLaVA's eval_pope.py scores it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ..statistics import Floats, Resampled
from .figures import Score, figure, resample
from .matching import Question
from .reading import Record, field, id_of, read_json_lines
from .sources import Sources

_PREFIX = "coco_pope_"
# Outcomes of a question: what was said of what is there, or no answer to it.
_OUTCOMES = 6
_TRUE_YES, _FALSE_YES, _FALSE_NO, _TRUE_NO, _YES_MISSING, _NO_MISSING = range(_OUTCOMES)
_NAMES = ("accuracy", "precision", "recall", "F1", "yes ratio")


def read(sources: Sources) -> list[Question]:
    """POPE's folder of coco_pope_CATEGORY.json files with LLaVA's question file; or one file of JSON lines.

    The one file has `question_id` and `label` (yes or no), and a `category` if there are several.
    """
    path = sources.annotations
    if not path.is_dir():
        return [
            Question(
                (id_of(record, f"{path.name}, line {number}"),),
                _label(record, f"{path.name}, line {number}"),
                (str(record.get("category", "all")),),
            )
            for number, record in read_json_lines(path, "annotations")
        ]
    if sources.question_file is None:
        raise ValueError(
            "the folder of POPE's annotations has no ids of questions; give LLaVA's questions, too, as "
            "--question-file llava_pope_test.jsonl"
        )
    return _read_folder(path, sources.question_file)


def _read_folder(folder: Path, question_file: Path) -> list[Question]:
    by_category: dict[str, list[Record]] = defaultdict(list)
    for number, record in read_json_lines(question_file, "questions"):
        where = f"{question_file.name}, line {number}"
        by_category[field(record, "category", str, where)].append(record)
    files = sorted(folder.glob(f"{_PREFIX}*.json"))
    if not files:
        raise ValueError(f"there are no {_PREFIX}CATEGORY.json files in {str(folder)!r}")
    found = []
    for file in files:
        category = file.stem.removeprefix(_PREFIX)
        labels, asked = read_json_lines(file, "annotations"), by_category[category]
        if len(labels) != len(asked):
            raise ValueError(
                f"{file.name} has {len(labels)} labels and {question_file.name} {len(asked)} questions of "
                f"category {category!r}; they have to belong together"
            )
        # They belong together by their order.
        for (number, label), question in zip(labels, asked, strict=True):
            where = f"{file.name}, line {number}"
            if "image" in label and label["image"] != question.get("image", label["image"]):
                raise ValueError(
                    f"{where} is about {label['image']}, and the question in its place in "
                    f"{question_file.name} about {question['image']}; they have to be in the same order"
                )
            name = id_of(question, f"{question_file.name}, category {category}")
            found.append(Question((name,), _label(label, where), (category,)))
    return found


def _label(record: Record, where: str) -> bool:
    label = record.get("label")
    if label not in ("yes", "no"):
        raise ValueError(f"{where}, label: expected yes or no, got {label!r}")
    return bool(label == "yes")


def says_yes(text: str) -> bool:
    """Everything is a yes that has no "No", "no" or "not" among the words of its first sentence."""
    words = text.split(".")[0].replace(",", "").split(" ")
    return not {"No", "no", "not"} & set(words)


def figures(questions: Sequence[Question], texts: Sequence[str | None]) -> Score:
    """The figures of each category, and their means over the categories, as papers give them."""
    outcomes = np.array([_outcome(q, t) for q, t in zip(questions, texts, strict=True)])
    categories = np.array([question.groups[0] for question in questions])
    names = sorted(set(categories.tolist()))
    counts = [np.bincount(outcomes[categories == name], minlength=_OUTCOMES) for name in names]
    parts = [resample(count, _figures, seed) for seed, count in enumerate(counts)]
    found = [
        figure(f"{what}, {name}", part.estimate(column), part.count)
        for name, part in zip(names, parts, strict=True)
        for column, what in enumerate(_NAMES)
    ]
    if len(names) > 1:
        whole = Resampled(
            np.mean([part.measured for part in parts], axis=0),
            np.mean([part.resampled for part in parts], axis=0),
            min(part.count for part in parts),
        )
        found = [
            figure(f"{what}, mean of categories", whole.estimate(column), len(questions))
            for column, what in enumerate(_NAMES)
        ] + found
    return found, []


def _outcome(question: Question, text: str | None) -> int:
    if text is None:
        return _YES_MISSING if question.truth else _NO_MISSING
    if says_yes(text):
        return _TRUE_YES if question.truth else _FALSE_YES
    return _FALSE_NO if question.truth else _TRUE_NO


def _figures(counts: Floats) -> Floats:
    """[rows, figures] of how often each outcome came, [rows, outcomes].

    A missing answer is neither a yes nor a no, so it counts as wrong.
    """
    right = counts[:, _TRUE_YES]
    said = right + counts[:, _FALSE_YES]
    there = right + counts[:, _FALSE_NO] + counts[:, _YES_MISSING]
    total = counts.sum(axis=1)
    accuracy = (right + counts[:, _TRUE_NO]) / total
    # The F1 is 2 P R / (P + R), and 0 where nothing that is there was said.
    figures = (accuracy, right / said, right / there, 2 * right / (said + there), said / total)
    return 100 * np.stack(figures, axis=1)
