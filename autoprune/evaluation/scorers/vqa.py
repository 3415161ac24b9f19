"""VQAv2 and VizWiz: soft accuracy over the answers of people."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .answer_text import evalai, in_one_line, soft_accuracy, vqa_answer
from .figures import Score, means
from .matching import Question
from .reading import field, id_of, read_json, read_json_lines
from .sources import Sources


def read_vqav2(sources: Sources) -> list[Question]:
    """The questions of v2_mscoco_val2014_annotations.json."""
    path = sources.annotations
    records = field(read_json(path, "annotations"), "annotations", list, path.name)
    found = []
    for index, record in enumerate(records):
        where = f"{path.name}, annotation {index}"
        found.append(Question((id_of(record, where),), _answers(record, where), _types(record)))
    return found


def vqav2(questions: Sequence[Question], texts: Sequence[str | None]) -> Score:
    """What LLaVA's converter uploads, scored as VQA's vqaEval.py does."""
    return means(questions, [_vqav2(q, t) for q, t in zip(questions, texts, strict=True)]), []


def _vqav2(question: Question, text: str | None) -> float:
    if text is None:
        return 0.0
    answers, given = [in_one_line(answer) for answer in question.truth], evalai(text)
    # Where all agree, the evaluator takes the answers as they are written.
    if len(set(answers)) > 1:
        answers, given = [vqa_answer(answer) for answer in answers], vqa_answer(given)
    return soft_accuracy(given, answers)


def read_vizwiz(sources: Sources) -> list[Question]:
    """The questions of VizWiz's val.json; their ids are those of the question file, or else the pictures."""
    path = sources.annotations
    records = read_json(path, "annotations")
    if not isinstance(records, list):
        raise ValueError(f"{path.name}: expected VizWiz's list of questions, such as its val.json")
    ids = _ids_of_pictures(sources)
    found = []
    for index, record in enumerate(records):
        where = f"{path.name}, question {index}"
        image = field(record, "image", str, where)
        name = ids.get(image, image)
        answers = [evalai(answer) for answer in _answers(record, where)]
        found.append(Question((name,), answers, _types(record)))
    return found


def vizwiz(questions: Sequence[Question], texts: Sequence[str | None]) -> Score:
    """Both sides as EvalAI's processor leaves them."""
    values = [
        0.0 if text is None else soft_accuracy(evalai(text), question.truth)
        for question, text in zip(questions, texts, strict=True)
    ]
    return means(questions, values), []


def _answers(record: Any, where: str) -> list[str]:
    answers = [
        field(answer, "answer", str, f"{where}, answers")
        for answer in field(record, "answers", list, where)
    ]
    if not answers:
        raise ValueError(
            f"{where}, answers: there are none; a split without them has to be uploaded"
        )
    return answers


def _types(record: Any) -> tuple[str, ...]:
    kind = record.get("answer_type")
    return (kind,) if isinstance(kind, str) else ()


def _ids_of_pictures(sources: Sources) -> dict[str, str]:
    path = sources.question_file
    if path is None:
        return {}
    return {
        field(record, "image", str, f"{path.name}, line {number}"): id_of(
            record, f"{path.name}, line {number}"
        )
        for number, record in read_json_lines(path, "questions")
    }
