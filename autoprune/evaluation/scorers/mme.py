"""MME: accuracy of questions and of whole pictures, as its calculation.py sums them."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ..statistics import Floats, Resampled
from .figures import Figure, Score, figure, resample
from .matching import Key, Question
from .reading import Answer, field, id_of, read_json_lines
from .sources import Sources

PERCEPTION = (
    "existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR",
)  # fmt: skip
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
_ALL = PERCEPTION + COGNITION
_SUMS = {"perception": PERCEPTION, "cognition": COGNITION, "perception + cognition": _ALL}
_PAIR = 2
_HOW = "Answer the question using a single word or phrase."
_YES_NO = "Please answer yes or no."


def read(sources: Sources) -> list[Question]:
    """MME_Benchmark_release_version, a folder for each task; or one file of JSON lines.

    The one file has `question_id`, `image`, `category` (the task) and `label` (yes or no). `truth` is
    the label and the picture.
    """
    path = sources.annotations
    found = list(_read_folder(path) if path.is_dir() else _read_lines(path))
    pictures = Counter((question.groups, question.truth[1]) for question in found)
    for (groups, picture), count in pictures.items():
        if count != _PAIR:
            raise ValueError(
                f"MME has {_PAIR} questions about each picture, and {groups[0]} has {count} about {picture}"
            )
    if not found:
        raise ValueError(f"there are no questions of MME in {str(path)!r}")
    return found


def _read_folder(folder: Path) -> list[Question]:
    found = []
    for task in sorted(path for path in folder.iterdir() if path.is_dir()):
        texts = task / "questions_answers_YN"
        for file in sorted((texts if texts.is_dir() else task).glob("*.txt")):
            for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
                if not line.strip():
                    continue
                where = f"{task.name}/{file.name}, line {number}"
                parts = line.strip().split("\t")
                if len(parts) != 2:
                    raise ValueError(f"{where}: expected a question, a tab and its answer")
                question, label = parts
                truth = (_label(label, where), file.stem)
                found.append(Question((task.name, file.name, question), truth, (task.name,)))
    return found


def _read_lines(path: Path) -> list[Question]:
    found = []
    for number, record in read_json_lines(path, "annotations"):
        where = f"{path.name}, line {number}"
        truth = (_label(record.get("label"), where), field(record, "image", str, where))
        task = field(record, "category", str, where)
        found.append(Question((id_of(record, where),), truth, (task,)))
    return found


def _label(label: object, where: str) -> str:
    if not isinstance(label, str) or label.lower() not in ("yes", "no"):
        raise ValueError(f"{where}: expected yes or no as the answer, got {label!r}")
    return label.lower()


def keys(answer: Answer) -> list[Key]:
    """Its id; or the task, the file of the picture and the question, as LLaVA's converter finds them."""
    places = answer.id.split("/")
    task, file = places[0], places[-1].split(".")[0] + ".txt"
    question = answer.prompt
    if _HOW in question:
        question = question.replace(_HOW, "").strip()
    if _YES_NO in question:
        return [(answer.id,), (task, file, question)]
    # Some files of MME have two spaces there.
    return [(answer.id,), *((task, file, f"{question}{gap}{_YES_NO}") for gap in (" ", "  "))]


def said(text: str) -> str:
    """yes, no, or other: what stands in the first four characters."""
    start = text.lower()[:4]
    return "yes" if "yes" in start else "no" if "no" in start else "other"


def figures(questions: Sequence[Question], texts: Sequence[str | None]) -> Score:
    """The sums of the scores of each task, then score, accuracy and accuracy+ of each."""
    right: dict[str, dict[str, list[bool]]] = defaultdict(lambda: defaultdict(list))
    for question, text in zip(questions, texts, strict=True):
        label, picture = question.truth
        answered = text is not None and said(text) == label
        right[question.groups[0]][picture].append(answered)
    tasks = [task for task in _ALL if task in right] + sorted(set(right) - set(_ALL))
    scores = {task: _scores(list(right[task].values()), seed) for seed, task in enumerate(tasks)}
    sizes = Counter(question.groups[0] for question in questions)
    found = _sums(scores, sizes)
    for task in tasks:
        for column, name in enumerate(("score", "accuracy", "accuracy+")):
            unit = "points" if name == "score" else "%"
            estimate = scores[task].estimate(column)
            found.append(figure(f"{name}, {task}", estimate, sizes[task], unit))
    absent = [task for task in _ALL if task not in right]
    unknown = [task for task in tasks if task not in _ALL]
    notes = [f"not in the sums, as there are no questions: {', '.join(absent)}"] if absent else []
    if unknown:
        notes.append(f"not in the sums, as MME has no such task: {', '.join(unknown)}")
    return found, notes


def _scores(pictures: Sequence[Sequence[bool]], seed: int) -> Resampled:
    """Score, accuracy and accuracy+ of a task, resampled by pictures."""
    kinds = Counter((len(picture), sum(picture)) for picture in pictures)
    asked, right = np.array(list(kinds), float).T

    def statistic(counts: Floats) -> Floats:
        accuracy = 100 * (counts @ right) / (counts @ asked)
        whole = 100 * (counts @ (asked == right)) / counts.sum(axis=1)
        return np.stack([accuracy + whole, accuracy, whole], axis=1)

    return resample(list(kinds.values()), statistic, seed)


def _sums(scores: dict[str, Resampled], sizes: Counter[str]) -> list[Figure]:
    found = []
    for name, tasks in _SUMS.items():
        chosen = [task for task in tasks if task in scores]
        parts = [scores[task] for task in chosen]
        if parts:
            whole = Resampled(
                np.sum([part.measured for part in parts], axis=0),
                np.sum([part.resampled for part in parts], axis=0),
                min(part.count for part in parts),
            )
            size = sum(sizes[task] for task in chosen)
            found.append(figure(name, whole.estimate(0), size, "points"))
    return found
