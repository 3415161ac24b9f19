"""A Ray cluster of this machine: the same answers as one process, though a worker or the driver is killed."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from autoprune import AutoPrune
from autoprune.evaluation.files import Asking, answer_file
from tests.files import data

pytest.importorskip("ray.data")

QUESTIONS = 24
WORKER = "ray::MapWorker"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Questions, one picture that is broken, and `one.jsonl` with the answers of one process."""
    folder = tmp_path_factory.mktemp("cluster")
    data.questions(folder, QUESTIONS)
    (folder / "images" / "5.png").write_bytes(b"no picture")
    asking = Asking(
        folder / "q.jsonl",
        folder / "images",
        AutoPrune(16),
        device="cpu",
        max_new_tokens=128,
        batch_size=1,
    )
    outcome = answer_file(asking, folder / "one.jsonl")
    assert outcome is not None and [failure.id for failure in outcome.failed] == [105]
    return folder


@pytest.fixture
def start(monkeypatch, folder, tmp_path):
    """Starts the run on two workers; whatever is left of it ends with the test."""
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    started, seen = [], set()
    options = ("--batch-size", 1, "--engine", "ray", "--workers", 2)

    def run(*more):
        process = data.shell(*data.words(folder, tmp_path / "a.jsonl", *options, *more))
        started.append(process)
        return process

    run.seen = seen
    yield run
    for process in started:
        seen |= set(descendants(process.pid))
        process.kill()
        process.communicate()
    for pid in seen:
        if is_ray(pid):
            os.kill(pid, signal.SIGKILL)


def parents() -> dict[int, int]:
    found = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            found[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
    return found


def descendants(pid: int) -> list[int]:
    above = parents()
    found, more = [], [pid]
    while more:
        more = [child for child, parent in above.items() if parent in more]
        found += more
    return found


def title(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
    except OSError:
        return ""


def is_ray(pid: int) -> bool:
    return "ray" in title(pid)


def journal(tmp_path: Path) -> Path:
    return tmp_path / "a.jsonl.run" / "answers-0.jsonl"


def wait_for_lines(process, path, lines):
    deadline = time.monotonic() + 300
    while not path.is_file() or path.read_bytes().count(b"\n") < lines:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)


def finish(process):
    _, err = process.communicate(timeout=400)
    # The broken picture is the one question without an answer.
    assert process.returncode == 1 and "question 105" in err, err


def positions(path):
    lines = data.read_lines(path)
    return [position for line in lines for position, _ in line["answers"]]


def test_a_killed_worker_changes_nothing(start, folder, tmp_path):
    process = start()
    wait_for_lines(process, journal(tmp_path), 3)
    workers = [pid for pid in descendants(process.pid) if title(pid).startswith(WORKER)]
    assert len(workers) == 2
    os.kill(workers[0], signal.SIGKILL)
    finish(process)
    assert (tmp_path / "a.jsonl").read_bytes() == (folder / "one.jsonl").read_bytes()
    answered = positions(journal(tmp_path))
    assert sorted(answered) == [n for n in range(QUESTIONS) if n != 5]


def test_what_a_worker_refuses_is_said_in_a_sentence(start, folder, tmp_path):
    process = start("--model", tmp_path / "nothing")
    _, err = process.communicate(timeout=400)
    assert process.returncode == 2
    assert "autoprune: a worker of Ray failed: ValueError: there is no model folder" in err


def test_a_killed_driver_goes_on_where_it_was(start, folder, tmp_path):
    process = start()
    wait_for_lines(process, journal(tmp_path), 4)
    start.seen |= set(descendants(process.pid))
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    before = journal(tmp_path).read_bytes()
    before = before[: before.rfind(b"\n") + 1]
    assert 4 <= before.count(b"\n") < QUESTIONS and not (tmp_path / "a.jsonl").exists()
    finish(start())
    assert (tmp_path / "a.jsonl").read_bytes() == (folder / "one.jsonl").read_bytes()
    assert journal(tmp_path).read_bytes().startswith(before)
    answered = positions(journal(tmp_path))
    assert sorted(answered) == [n for n in range(QUESTIONS) if n != 5]
