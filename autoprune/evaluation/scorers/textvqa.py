"""TextVQA, as LLaVA's eval_textvqa.py scores it."""

from __future__ import annotations

from collections.abc import Sequence

from .answer_text import evalai, soft_accuracy
from .figures import Score, mean
from .matching import Key, Question
from .reading import Answer, field, id_of, read_json
from .sources import Sources

PEOPLE = 10
_OCR_FIRST = "Reference OCR token:"


def read(sources: Sources) -> list[Question]:
    """The questions of TextVQA_0.5.1_val.json."""
    path = sources.annotations
    data = field(read_json(path, "annotations"), "data", list, path.name)
    keyed, truths = [], {}
    for index, record in enumerate(data):
        where = f"{path.name}, data {index}"
        answers = field(record, "answers", list, where)
        if len(answers) != PEOPLE or not all(isinstance(answer, str) for answer in answers):
            raise ValueError(f"{where}, answers: expected {PEOPLE} texts, got {answers!r:.80}")
        key = (id_of(record, where, "image_id"), field(record, "question", str, where).lower())
        keyed.append(key)
        # Of equal questions about one picture the last one's answers count, as in the released code.
        truths[key] = [evalai(answer) for answer in answers]
    return [Question(key, truths[key]) for key in keyed]


def keys(answer: Answer) -> list[Key]:
    """LLaVA's files give the picture as the question's id; the prompt tells which question it was."""
    return [(answer.id, asked(answer))]


def asked(answer: Answer) -> str:
    """The question in a prompt of LLaVA's files, in lower case.

    Raises:
        ValueError: a prompt of another form.
    """
    prompt = answer.prompt
    lines = prompt.split("\n")
    if prompt.startswith("OCR tokens: ") and "Question: " in prompt and " Short answer:" in prompt:
        return prompt.split("Question: ", 1)[1].split(" Short answer:", 1)[0].lower()
    if len(lines) == 3 and _OCR_FIRST in prompt:
        return lines[1 if prompt.startswith(_OCR_FIRST) else 0].lower()
    if len(lines) == 2:
        return lines[0].lower()
    raise ValueError(
        f"line {answer.line} of the answers: the prompt {prompt!r:.80} is not of LLaVA's TextVQA form: the "
        "question, a line of OCR tokens if there are any, and a last line that says how to answer"
    )


def figures(questions: Sequence[Question], texts: Sequence[str | None]) -> Score:
    values = [
        0.0 if text is None else soft_accuracy(evalai(text), question.truth)
        for question, text in zip(questions, texts, strict=True)
    ]
    return [mean("accuracy", values)], []
