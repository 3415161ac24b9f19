"""Files of answers and of annotations."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Record = dict[str, Any]


@dataclass(frozen=True)
class Answer:
    """One line of a file of answers: what was asked, and what the model said.

    id: `question_id` as text, so 7 and "7" are the same question. line: counted from 1.
    """

    id: str
    prompt: str
    text: str
    line: int


def read_answers(path: Path) -> list[Answer]:
    """The answers of a file of JSON lines in LLaVA's form: `question_id`, `prompt`, `text`.

    The prompt may be missing. What else a line holds is not looked at.

    Raises:
        ValueError: the file is missing, empty, or has a line that is no answer; its number is named.
    """
    answers = []
    for number, record in read_json_lines(path, "answers"):
        where = f"{path.name}, line {number}"
        text, prompt = record.get("text"), record.get("prompt", "")
        if not isinstance(text, str) or not isinstance(prompt, str):
            raise ValueError(
                f"{where}: expected text and prompt to be strings, got {record!r:.120}"
            )
        answers.append(Answer(id_of(record, where), prompt, text, number))
    if not answers:
        raise ValueError(f"there are no answers in {str(path)!r}; give one JSON object per line")
    return answers


def id_of(record: Record, where: str, field: str = "question_id") -> str:
    """An id as text, whether it is written as a number or a string.

    Raises:
        ValueError: there is none.
    """
    value = record.get(field)
    if isinstance(value, bool) or not isinstance(value, (str, int)) or value == "":
        raise ValueError(f"{where}, {field}: expected a number or a text, got {value!r}")
    return str(value)


def read_json_lines(path: Path, what: str) -> list[tuple[int, Record]]:
    """The objects of a file of JSON lines, with the numbers of their lines; blank lines are passed over.

    Raises:
        ValueError: the file cannot be read, or a line is no JSON object.
    """
    found = []
    # Other line ends may stand inside the JSON.
    for number, line in enumerate(_text(path, what).split("\n"), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path.name}, line {number} is no JSON: {error}") from error
        if not isinstance(record, dict):
            raise ValueError(f"{path.name}, line {number}: expected a JSON object, got {line:.80}")
        found.append((number, record))
    return found


def read_json(path: Path, what: str) -> Any:
    """The value of a JSON file.

    Raises:
        ValueError: the file cannot be read, or is no JSON.
    """
    try:
        return json.loads(_text(path, what))
    except json.JSONDecodeError as error:
        raise ValueError(f"{str(path)!r} is no JSON: {error}") from error


def field(record: Any, name: str, kind: type, where: str) -> Any:
    """A field of a record, of the kind that is expected.

    Raises:
        ValueError: it is missing, or something else.
    """
    value = record.get(name) if isinstance(record, dict) else None
    if not isinstance(value, kind) or isinstance(value, bool) is not (kind is bool):
        names = {str: "a text", list: "a list", dict: "an object", int: "a number"}
        raise ValueError(f"{where}, {name}: expected {names[kind]}, got {value!r:.80}")
    return value


def _text(path: Path, what: str) -> str:
    if path.is_dir():
        raise ValueError(f"{str(path)!r} is a folder; give the file of the {what}")
    if not path.is_file():
        raise ValueError(f"there is no file of {what} {str(path)!r}")
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{str(path)!r} is no text in UTF-8: {error}") from error
