"""ScienceQA: the letter that was chosen, as LLaVA's eval_science_qa.py reads it."""

from __future__ import annotations

import re
from collections.abc import Sequence

from .figures import Score, means
from .matching import Question
from .reading import field, read_json
from .sources import Sources

LETTERS = "ABCDE"
IMAGE = "with an image"
_THE_ANSWER_IS = re.compile(r"The answer is ([A-E])")


def read(sources: Sources) -> list[Question]:
    """The problems of a split, of a folder with problems.json and pid_splits.json."""
    folder = sources.annotations
    if not folder.is_dir():
        raise ValueError(
            f"{str(folder)!r} is no folder; give that of ScienceQA's problems.json and pid_splits.json"
        )
    splits = read_json(folder / "pid_splits.json", "annotations")
    problems = read_json(folder / "problems.json", "annotations")
    if not isinstance(splits, dict) or sources.split not in splits:
        raise ValueError(
            f"there is no split {sources.split!r}; pid_splits.json has {', '.join(splits)}"
        )
    found = []
    for name in map(str, splits[sources.split]):
        where = f"problems.json, {name}"
        problem = field(problems, name, dict, "problems.json")
        right = field(problem, "answer", int, where)
        if not 0 <= right < len(LETTERS):
            raise ValueError(f"{where}, answer: expected 0 to {len(LETTERS) - 1}, got {right}")
        found.append(Question((name,), LETTERS[right], (IMAGE,) if problem.get("image") else ()))
    return found


def letter(text: str) -> str | None:
    """The letter in "B", "B. whales" or "... The answer is B."; None if there is no such thing."""
    text = text.replace("\n", ". ")
    if text.strip() and text.strip() in LETTERS and len(text.strip()) == 1:
        return text.strip()
    if text[:1] and text[0] in LETTERS and text[1:3] == ". ":
        return text[0]
    # The one with a point behind it goes before one without.
    found = re.search(_THE_ANSWER_IS.pattern + r"\.", text) or _THE_ANSWER_IS.search(text)
    return found[1] if found else None


def figures(questions: Sequence[Question], texts: Sequence[str | None]) -> Score:
    values, unread = [], 0
    for question, text in zip(questions, texts, strict=True):
        chosen = None if text is None else letter(text)
        unread += text is not None and chosen is None
        values.append(float(chosen == question.truth))
    notes = [f"{unread} answers name no letter and count as wrong"] if unread else []
    return means(questions, values), notes
