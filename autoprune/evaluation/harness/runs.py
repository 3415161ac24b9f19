"""One task under one setting, in a process of its own; finished once and for all, or not at all."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ...files import write_whole
from ..settings import Setting
from .outputs import Output, Unfinished, read_output

COSTS, LOG, DONE, REFUSED = "costs.jsonl", "log.txt", "done.json", "costs.jsonl.refused"
_LINES = 5
"""Of a log's end, and of its errors, shown where a run failed."""
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")
_ERROR = re.compile(r"[\w.]*(Error|Exception)\b")
_POLL = 0.5


@dataclass(frozen=True, eq=False)
class Job:
    """A setting, and how the plugin is told of it.

    arguments: of `--model_args`. fingerprint: what a finished run is reused for; another one is run again.
    """

    setting: Setting
    arguments: Mapping[str, str]
    fingerprint: str = ""


@dataclass(frozen=True)
class Harness:
    """How every run of one evaluation calls the harness."""

    arguments: Mapping[str, str]
    batch_size: int
    limit: int | None
    seed: int
    include_path: Path | None

    def command(self, job: Job, task: str, folder: Path) -> list[str]:
        """The call that writes its output into `folder`.

        Raises:
            ValueError: a value that the harness would take for two.
        """
        arguments = {**self.arguments, **job.arguments, "costs": str(folder / COSTS)}
        for name, value in arguments.items():
            if "," in value:
                raise ValueError(f"lmms-eval cannot be given {name} with a comma in it: {value!r}")
        options = {
            "--model": "autoprune",
            "--model_args": ",".join(f"{name}={value}" for name, value in arguments.items()),
            "--tasks": task,
            "--batch_size": str(self.batch_size),
            "--output_path": str(folder),
            "--seed": str(self.seed),
            "--limit": None if self.limit is None else str(self.limit),
            "--include_path": None if self.include_path is None else str(self.include_path),
        }
        given = [word for pair in options.items() if pair[1] is not None for word in pair]
        module = f"{__package__}.launch"
        return [sys.executable, "-m", module, *map(str, given), "--log_samples"]


@dataclass
class Failed(Exception):
    """A run that did not finish."""

    task: str
    setting: Setting
    reason: str
    log: Path

    def __str__(self) -> str:
        asked = f"{self.setting.label} at {self.setting.budget}"
        return f"{self.task}, {asked}: {self.reason}; its log is {str(self.log)!r}"

    def last_lines(self) -> list[str]:
        """What its log says: the errors in it, as the last one often hides the first, and its end."""
        if not self.log.is_file():
            return []
        text = _COLOURS.sub("", self.log.read_text(encoding="utf-8", errors="replace"))
        lines = [line for line in text.splitlines() if line.strip()]
        errors = dict.fromkeys(line for line in lines[:-_LINES] if _ERROR.match(line))
        return [*list(errors)[:_LINES], *lines[-_LINES:]]


def finished(place: Path, task: str, fingerprint: str) -> Output | str | None:
    """The output of a run that was finished before, or why the setting was refused; None if there is none."""
    try:
        done = json.loads((place / DONE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if done["fingerprint"] != fingerprint:
        return None
    if done["refused"] is not None:
        return str(done["refused"])
    try:
        return read_output(place, place / COSTS, task)
    except Unfinished:
        # Somebody took a file away.
        return None


def run(
    harness: Harness, job: Job, task: str, place: Path, on_answers: Callable[[int], None]
) -> Output | str:
    """Run a task and keep it at `place`.

    Args:
        place: a folder that is there only once the run is finished.
        on_answers: called with the number of answers so far, now and then.

    Returns:
        The output, or why this setting cannot run on this model or these prompts.

    Raises:
        Failed: the run ended without all that it should leave. What it left is kept beside `place`.
    """
    for old in place.parent.glob(f"{place.name}.*"):
        shutil.rmtree(old)
    # A run that outlived its parent goes on writing into the folder it was given.
    folder = place.with_name(f"{place.name}.{uuid.uuid4().hex[:8]}")
    folder.mkdir(parents=True)
    code = _call(harness.command(job, task, folder), folder, on_answers)
    refused = folder / REFUSED
    reason = refused.read_text(encoding="utf-8") if refused.is_file() else None
    found: Output | str
    if reason is None:
        try:
            if code:
                raise Unfinished(f"the harness ended with exit code {code}")
            found = read_output(folder, folder / COSTS, task)
        except Unfinished as error:
            kept = place.with_name(f"{place.name}.failed")
            folder.rename(kept)
            raise Failed(task, job.setting, str(error), kept / LOG) from error
    else:
        found = reason
    write_whole(folder / DONE, json.dumps({"fingerprint": job.fingerprint, "refused": reason}))
    shutil.rmtree(place, ignore_errors=True)
    folder.rename(place)
    return found


def _call(command: Sequence[str], folder: Path, on_answers: Callable[[int], None]) -> int:
    """The exit code; 0 says little, as the harness ends with it whatever happened."""
    with (folder / LOG).open("wb") as log:
        process = subprocess.Popen(
            command,
            stdout=log,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env=_surroundings(),
        )
        try:
            while process.poll() is None:
                on_answers(_lines(folder / COSTS))
                time.sleep(_POLL)
        finally:
            process.kill()
            process.wait()
    return process.returncode


def _surroundings() -> dict[str, str]:
    """So that the process finds this library as this one does."""
    root = str(Path(__file__).parents[3])
    path = os.environ.get("PYTHONPATH")
    return {
        **os.environ,
        "PYTHONPATH": f"{root}{os.pathsep}{path}" if path else root,
        "TOKENIZERS_PARALLELISM": "false",
    }


def _lines(path: Path) -> int:
    try:
        return path.read_bytes().count(b"\n")
    except OSError:
        return 0
