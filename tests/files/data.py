"""Small sets in the formats of LLaVA's scripts, about scenes that the embedded model knows."""

from __future__ import annotations

import base64
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from autoprune import tiny

ANSWER = ("answer", "--budget", "16", "--device", "cpu")


def questions(folder: Path, count: int, first: int = 0) -> list[dict[str, Any]]:
    """Writes pictures and `q.jsonl` in LLaVA's format; the records of it."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    records = []
    drawn = tiny.heldout_questions(count, (*tiny.EASY, *tiny.HARD), first)
    for number, (scene, question) in enumerate(drawn):
        scene.image.save(folder / "images" / f"{number}.png")
        records.append(
            {
                "question_id": 100 + number,
                "image": f"{number}.png",
                "text": question.text,
                "category": question.kind,
            }
        )
    write_lines(folder / "q.jsonl", records)
    return records


def write_lines(path: Path, records: Sequence[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def in_base64(picture: Path) -> str:
    return base64.b64encode(picture.read_bytes()).decode()


def words(folder: Path, answers: Path, *more: object, asked: str = "q.jsonl") -> list[str]:
    """The command that answers the questions of a folder."""
    where = ("--question-file", folder / asked, "--image-folder", folder / "images")
    return [str(word) for word in (*ANSWER, *where, "--answers-file", answers, *more)]


def shell(*command: str, python: Sequence[str] = ("-m", "autoprune")) -> subprocess.Popen[str]:
    """The command in a process of its own."""
    return subprocess.Popen(
        [sys.executable, *python, *command],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def kill_after(process: subprocess.Popen[str], journal: Path, lines: int) -> None:
    """SIGKILL once the journal has so many lines."""
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        if journal.is_file() and journal.read_bytes().count(b"\n") >= lines:
            os.kill(process.pid, signal.SIGKILL)
            process.communicate()
            assert process.returncode == -signal.SIGKILL
            return
        if process.poll() is not None:
            raise AssertionError(f"it ended by itself: {process.communicate()}")
        time.sleep(0.02)
    process.kill()
    raise AssertionError("it wrote too little in five minutes")
