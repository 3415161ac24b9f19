"""GQA: exact match, as its eval.py scores what LLaVA's convert_gqa_for_eval.py writes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .figures import Score, means
from .matching import Question
from .reading import field, read_json
from .sources import Sources


def read(sources: Sources) -> list[Question]:
    """The balanced questions of a file such as testdev_balanced_questions.json; others do not count."""
    path = sources.annotations
    records = read_json(path, "annotations")
    if not isinstance(records, dict):
        raise ValueError(f"{path.name}: expected GQA's object of questions by their ids")
    return [
        Question((name,), field(record, "answer", str, f"{path.name}, {name}"), _types(record))
        for name, record in records.items()
        if not isinstance(record, dict) or record.get("isBalanced", True)
    ]


def _types(record: Any) -> tuple[str, ...]:
    types = record.get("types")
    if not isinstance(types, dict):
        return ()
    found = [f"{name} {types[name]}" for name in ("structural", "semantic") if name in types]
    if "structural" in types:
        found.append("open" if types["structural"] == "query" else "binary")
    return tuple(found)


def figures(questions: Sequence[Question], texts: Sequence[str | None]) -> Score:
    values = [
        float(text is not None and text.rstrip(".").lower() == question.truth)
        for question, text in zip(questions, texts, strict=True)
    ]
    return means(questions, values), []
