"""What is answered so far, kept so that a run which is killed goes on where it was."""

from __future__ import annotations

import json
import os
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from ...files import open_whole

try:
    import fcntl
except ImportError:  # Windows, where two runs are not kept apart
    fcntl = None  # type: ignore[assignment]

_NOT_YET = -1


@dataclass(frozen=True)
class Failure:
    """A question without an answer: its place in the file, its id, and why."""

    position: int
    id: str | int | None
    reason: str


@dataclass(frozen=True)
class Entry:
    """What became of some questions. `answers` are (position, answer as it is written)."""

    answers: list[tuple[int, dict[str, Any]]] = field(default_factory=list)
    failed: list[Failure] = field(default_factory=list)

    def __add__(self, other: Entry) -> Entry:
        return Entry(self.answers + other.answers, self.failed + other.failed)

    def to_line(self) -> str:
        failed = [[failure.position, failure.id, failure.reason] for failure in self.failed]
        return json.dumps({"answers": self.answers, "failed": failed}) + "\n"

    @classmethod
    def of_line(cls, line: str | bytes) -> Entry:
        record = json.loads(line)
        answers = [(position, answer) for position, answer in record["answers"]]
        return cls(answers, [Failure(*failed) for failed in record["failed"]])


class Journal:
    """A folder of entries: each process that answers appends to a file of its own, a line for each batch.

    Args:
        folder: where the files are.
        size: positions that there are.
    """

    def __init__(self, folder: Path, size: int):
        self._folder, self._size = folder, size

    def writer(self, process: int = 0) -> Writer:
        return Writer(self._folder / f"answers-{process}.jsonl")

    def answered(self) -> bytearray:
        """For each position, whether it has an answer; one byte each."""
        done = bytearray(self._size)
        for _, _, entry in self._entries():
            for position, _ in entry.answers:
                done[position] = True
        return done

    def failures(self, positions: range) -> list[Failure]:
        """Those of `positions` that were tried and have no answer, in order."""
        last: dict[int, Failure] = {}
        done = self.answered()
        for _, _, entry in self._entries():
            last.update({failure.position: failure for failure in entry.failed})
        return [last[at] for at in sorted(last) if at in positions and not done[at]]

    def join(self, positions: range, path: Path) -> None:
        """Write the answers at these positions into one file, in order. The file appears whole."""
        files = self._files()
        which, where = array("i", [_NOT_YET]) * self._size, array("q", [0]) * self._size
        for number, offset, entry in self._entries():
            for position, _ in entry.answers:
                which[position], where[position] = number, offset
        opened = [file.open("rb") for file in files]
        try:
            with open_whole(path) as out:
                here, answers = (_NOT_YET, 0), dict[int, Any]()
                for position in positions:
                    if which[position] == _NOT_YET:
                        continue
                    if here != (which[position], where[position]):
                        here = (which[position], where[position])
                        opened[here[0]].seek(here[1])
                        answers = dict(Entry.of_line(opened[here[0]].readline()).answers)
                    out.write((json.dumps(answers[position]) + "\n").encode())
                out.flush()
                os.fsync(out.fileno())
        finally:
            for file in opened:
                file.close()

    def _files(self) -> list[Path]:
        return sorted(self._folder.glob("answers-*.jsonl"))

    def _entries(self) -> Iterator[tuple[int, int, Entry]]:
        """Number of the file, offset in it, and the entry; what a kill tore is passed over."""
        for number, path in enumerate(self._files()):
            offset = 0
            with path.open("rb") as lines:
                for line in lines:
                    entry = _whole(line)
                    if entry is not None:
                        yield number, offset, entry
                    offset += len(line)


class Writer:
    """Appends entries to a file that no other process may append to.

    Raises:
        ValueError: another process does.
    """

    def __init__(self, path: Path):
        self._file: IO[bytes] = path.open("a+b")
        if fcntl is not None:
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                self._file.close()
                raise ValueError(
                    f"another run writes to {str(path.parent)!r}; wait for it, or give another answers file"
                ) from error
        self._end_torn_line()

    def append(self, entry: Entry) -> None:
        """Returns when the entry is on the disk. One without anything leaves no trace."""
        if entry == Entry():
            return
        self._file.write(entry.to_line().encode())
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()

    def _end_torn_line(self) -> None:
        """Drop what was written of a last line."""
        end = self._file.seek(0, os.SEEK_END)
        while end:
            start = max(end - 4096, 0)
            self._file.seek(start)
            found = self._file.read(end - start).rfind(b"\n")
            if found >= 0:
                end = start + found + 1
                break
            end = start
        self._file.truncate(end)


def _whole(line: bytes) -> Entry | None:
    """The entry of a line; None if the line is torn."""
    try:
        return Entry.of_line(line)
    except (ValueError, KeyError, TypeError):
        return None


def write_failures(path: Path, failures: Sequence[Failure]) -> None:
    """A line for each; no file if there is none."""
    if not failures:
        path.unlink(missing_ok=True)
        return
    with open_whole(path) as file:
        for failure in failures:
            record = {
                "position": failure.position,
                "question_id": failure.id,
                "reason": failure.reason,
            }
            file.write((json.dumps(record) + "\n").encode())
