"""Questions of LLaVA's files, one after the other: its JSON lines, ScienceQA's JSON, MMBench's table."""

from __future__ import annotations

import csv
import hashlib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TextIO

LINES, SCIENCE, TABLE = "JSON lines", "ScienceQA's JSON", "MMBench's table"

INSTRUCTIONS = {
    "en": "Answer with the option's letter from the given choices directly.",
    "cn": "请直接回答选项字母。",
}
"""What LLaVA's scripts add to questions with options (`--single-pred-prompt`), by language."""

_LETTERS = "ABCD"
_PIECE = 1 << 16
_LONGEST_FIELD = 2**31 - 1
# What pandas, which LLaVA reads the table with, takes for no value at all. "Na" is sodium.
_NOTHING = re.compile(r"#?N/A|#N/A N/A|#?NA|-?1\.#(IND|QNAN)|-?nan|-?NaN|<NA>|NULL|n/a|null|")
_NO_NUMBER = ("nan", "none")


@dataclass(frozen=True)
class Question:
    """A question of a file.

    Attributes:
        position: its place in the file, from 0. Ids alone do not tell questions apart: MME asks two about a
            picture, under one id.
        id: as it stands in the file; None where it cannot be read.
        text: what the model is asked. prompt: what the answer repeats of it, where converters look it up.
        image: the picture's file, or its bytes in base64; None if there is no picture.
        fields: what else the answer repeats.
        problem: why it cannot be asked; empty if it can.
    """

    position: int
    id: str | int | None
    text: str = ""
    prompt: str = ""
    image: Path | bytes | None = None
    fields: dict[str, Any] = field(default_factory=dict)
    problem: str = ""


@dataclass(frozen=True)
class QuestionFile:
    """A file of questions, read from its start whenever it is asked for.

    Args:
        path: JSON lines, a JSON list, or a table whose name ends in .tsv.
        images: the folder of the pictures.
        instruction: added to questions with options; one of the other files has none.

    Raises:
        ValueError: there is no such file or folder, or the instruction fits no question of it.
    """

    path: Path
    images: Path
    instruction: str = ""

    def __post_init__(self) -> None:
        if not self.path.is_file():
            raise ValueError(f"there is no question file {str(self.path)!r}")
        if not self.images.is_dir():
            raise ValueError(f"there is no image folder {str(self.images)!r}")
        if self.instruction and self.format == LINES:
            raise ValueError(
                f"{str(self.path)!r} holds LLaVA's JSON lines, whose texts are complete; --single-pred-prompt "
                "is for ScienceQA's JSON and MMBench's tsv: leave it out"
            )

    @property
    def format(self) -> str:
        """One of `LINES`, `SCIENCE` and `TABLE`."""
        if self.path.suffix.lower() == ".tsv":
            return TABLE
        with self.path.open("rb") as file:
            start = file.read(_PIECE).removeprefix(b"\xef\xbb\xbf").lstrip()
        return SCIENCE if start.startswith(b"[") else LINES

    def __iter__(self) -> Iterator[Question]:
        """Every question, those that cannot be asked included.

        Raises:
            ValueError: the file as a whole is not of its format.
        """
        read = {LINES: self._lines, SCIENCE: self._science, TABLE: self._table}[self.format]
        for question in read():
            yield _checked(question)

    def digest(self) -> str:
        """What tells the file from others."""
        digest = hashlib.sha256()
        with self.path.open("rb") as file:
            while piece := file.read(_PIECE):
                digest.update(piece)
        return digest.hexdigest()[:16]

    def _lines(self) -> Iterator[Question]:
        position = 0
        with self.path.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                yield self._read(position, f"line {number}", _line_record(line), _of_line)
                position += 1

    def _science(self) -> Iterator[Question]:
        with self.path.open(encoding="utf-8-sig", errors="surrogateescape") as file:
            for position, item in enumerate(_items(file, self.path)):
                yield self._read(position, f"item {position + 1}", item, self._of_problem)

    def _table(self) -> Iterator[Question]:
        csv.field_size_limit(_LONGEST_FIELD)
        with self.path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            rows = csv.DictReader(file, delimiter="\t")
            missing = {"index", "image", "question", "A"} - set(rows.fieldnames or ())
            if missing:
                raise ValueError(
                    f"{str(self.path)!r} has no column {sorted(missing)[0]!r}; MMBench's table has index, "
                    "image, question, A, B, C, D and hint, separated by tabs"
                )
            for position, row in enumerate(rows):
                yield self._read(position, f"row {position + 1}", row, self._of_row)

    def _read(
        self, position: int, where: str, record: Any, read: Callable[[int, Any], Question]
    ) -> Question:
        """The question of a record, or what is wrong with it."""
        try:
            if isinstance(record, ValueError):
                raise record
            if not isinstance(record, dict):
                raise ValueError("expected an object")
            question = read(position, record)
        except ValueError as error:
            known = record if isinstance(record, dict) else {}
            name = next(
                (known[key] for key in ("question_id", "id", "index") if key in known), None
            )
            name = name if isinstance(name, (str, int)) else None
            return Question(position, name, problem=f"{where}: {error}")
        if isinstance(question.image, Path):
            question = replace(question, image=self.images / question.image)
        return question

    def _of_problem(self, position: int, record: dict[str, Any]) -> Question:
        turns = record.get("conversations")
        if not isinstance(turns, list) or not turns or not isinstance(turns[0], dict):
            raise ValueError(f"conversations: expected a list of turns, got {_shown(turns)}")
        asked = _text(turns[0], "value").replace("<image>", "").strip()
        asked = "\n".join([asked, *filter(None, [self.instruction])])
        image = _image(record)
        prompt = asked if image is None else f"<image>\n{asked}"
        return Question(position, _id(record, "id"), asked, prompt, image)

    def _of_row(self, position: int, row: dict[str, Any]) -> Question:
        options = []
        for letter in _LETTERS:
            if _is_nothing(row.get(letter)):
                break
            options.append(row[letter])
        parts = [] if _is_nothing(row.get("hint")) else [row["hint"]]
        parts += [_text(row, "question")]
        parts += [f"{letter}. {option}" for letter, option in zip(_LETTERS, options, strict=False)]
        prompt = "\n".join(parts)
        text = "\n".join([prompt, *filter(None, [self.instruction])])
        index = _id(row, "index")
        name = int(index) if isinstance(index, str) and index.strip().isdigit() else index
        letters = list(_LETTERS[: len(options)])
        fields = {"round_id": 0, "options": options, "option_char": letters}
        return Question(position, name, text, prompt, _text(row, "image").encode(), fields)


class Forward:
    """Questions of a file by position. Going on is cheap; going back reads the file from its start."""

    def __init__(self, file: QuestionFile):
        self._file = file
        self._next, self._rest = 0, iter(file)

    def take(self, positions: Sequence[int]) -> list[Question]:
        """The questions at these positions, which ascend."""
        if positions and positions[0] < self._next:
            self._next, self._rest = 0, iter(self._file)
        taken = []
        for position in positions:
            while self._next <= position:
                question = next(self._rest)
                self._next += 1
            taken.append(question)
        return taken


def _line_record(line: bytes) -> Any:
    try:
        return json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError:
        return ValueError("no text in UTF-8")
    except (ValueError, RecursionError) as error:
        return ValueError(f"no JSON: {error}")


def _of_line(position: int, record: dict[str, Any]) -> Question:
    text = _text(record, "text")
    return Question(position, _id(record, "question_id"), text, text, _image(record))


def _items(file: TextIO, path: Path) -> Iterator[Any]:
    """The items of a JSON list, without the whole of it in memory."""
    decode = json.JSONDecoder().raw_decode
    pending, size = file.read(_PIECE).lstrip()[1:], _PIECE
    while True:
        pending = pending.lstrip().removeprefix(",").lstrip()
        if pending.startswith("]"):
            return
        try:
            item, end = decode(pending)
        except (json.JSONDecodeError, RecursionError) as error:
            more = file.read(size)
            if not more:
                raise ValueError(f"{str(path)!r} is no list in JSON: {error}") from error
            pending, size = pending + more, size * 2
            continue
        yield item
        pending, size = pending[end:], _PIECE


def _checked(question: Question) -> Question:
    """The question, with a problem where its text is none that a tokenizer takes."""
    try:
        question.text.encode()
    except UnicodeEncodeError:
        return replace(question, problem="the text holds half a character, or is not in UTF-8")
    return question


def _id(record: dict[str, Any], key: str) -> str | int:
    value = record.get(key)
    if isinstance(value, bool) or not isinstance(value, (str, int)) or value == "":
        raise ValueError(f"{key}: expected a text or a number, got {_shown(value)}")
    return value


def _text(record: dict[str, Any], key: str) -> str:
    value = record.get(key)
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{key}: expected a text, got {_shown(value)}")
    return value


def _image(record: dict[str, Any]) -> Path | None:
    return None if record.get("image") is None else Path(_text(record, "image"))


def _is_nothing(value: Any) -> bool:
    return value is None or _NOTHING.fullmatch(value) is not None or value.lower() in _NO_NUMBER


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."
