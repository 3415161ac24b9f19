"""`autoprune eval` with the harness: killed in the middle, started again, and where a task fails."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from autoprune import cli
from autoprune.evaluation.harness import runs

from .conftest import BUDGET, Evaluate
from .pope import TASK

PATIENCE = 900


def words(data: Path, folder: Path, *more: str) -> list[str]:
    asked = ["eval", "--budgets", str(BUDGET), "--tasks", TASK]
    return [
        *asked,
        "--include-path",
        str(data),
        "--batch-size",
        "4",
        "--output",
        str(folder),
        *more,
    ]


def stopped(arguments: list[str]) -> int:
    """The exit code of a call in this process."""
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    return int(stop.value.code or 0)


def wait_for(found: Any) -> None:
    end = time.monotonic() + PATIENCE
    while not found():
        assert time.monotonic() < end
        time.sleep(0.1)


@pytest.fixture(scope="module")
def evaluated(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """A run that was killed while the second setting ran, and started again; and when the first was
    finished.
    """
    folder = tmp_path_factory.mktemp("eval") / "run"
    process = subprocess.Popen(
        [sys.executable, "-m", "autoprune", *words(data, folder)],
        start_new_session=True,
        stderr=subprocess.DEVNULL,
        cwd=Path(__file__).parents[2],
    )
    first = folder / "runs" / "full__1" / TASK / runs.DONE
    try:
        wait_for(first.is_file)
        wait_for(lambda: list((folder / "runs").glob("autoprune__16/*/log.txt")))
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    done = first.stat().st_mtime
    assert not (folder / "report.md").exists()
    assert stopped(words(data, folder)) == 0
    return folder, done


def test_a_finished_setting_is_not_run_again(evaluated: tuple[Path, float]):
    folder, done = evaluated
    assert (folder / "runs" / "full__1" / TASK / runs.DONE).stat().st_mtime == done
    names = sorted(path.name for path in (folder / "runs" / f"autoprune__{BUDGET}").iterdir())
    assert names == [TASK]


def test_every_answer_is_that_of_an_unbroken_run(evaluated: tuple[Path, float], evaluate: Evaluate):
    lines = (evaluated[0] / "predictions" / f"autoprune__{BUDGET}.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    found = evaluate(TASK, f"method=autoprune,budget={BUDGET}")
    assert [record["prediction"] for record in records] == [
        sample["filtered_resps"][0] for sample in found["samples"][TASK]
    ]
    assert [record["correct"] for record in records] == [
        sample["pope_accuracy"]["score"] for sample in found["samples"][TASK]
    ]
    score = json.loads((evaluated[0] / "scores.json").read_text())[1]
    own = found["results"][TASK]
    assert score["tasks"][TASK]["figures"]["pope_f1_score"] == own["pope_f1_score,none"]
    assert score["tasks"][TASK]["score"] == own["pope_accuracy,none"]


def test_the_report_is_that_of_compare_with_the_harness_scores(evaluated: tuple[Path, float]):
    folder = evaluated[0]
    text = (folder / "report.md").read_text()
    assert "# Comparison of pruning methods" in text
    assert "## Scores of lmms-eval" in text
    full, autoprune = json.loads((folder / "results.json").read_text())["rows"]
    assert full["accuracy"] == 1
    assert autoprune["tokens_entering"] == BUDGET
    assert autoprune["accuracy_low"] is not None
    assert (folder / "accuracy_vs_flops.png").stat().st_size > 1000


def test_the_same_call_runs_nothing_again(evaluated: tuple[Path, float], data: Path, monkeypatch):
    monkeypatch.setattr(runs.subprocess, "Popen", None)
    assert stopped(words(data, evaluated[0])) == 0


def test_another_evaluation_is_not_mixed_in(evaluated: tuple[Path, float], data: Path, capsys):
    assert stopped(words(data, evaluated[0], "--limit", "3")) == 2
    assert "holds another comparison: limit was None and is 3" in capsys.readouterr().err


def test_a_task_that_fails_is_named_with_its_log(data: Path, tmp_path: Path, capsys):
    """lmms-eval ends with exit code 0."""
    (tmp_path / "tasks").mkdir()
    broken = (data / "autoprune_shapes.yaml").read_text().replace("shapes.parquet", "gone.parquet")
    (tmp_path / "tasks" / "broken.yaml").write_text(broken.replace("autoprune_shapes", "broken"))
    (tmp_path / "tasks" / "utils.py").write_text((data / "utils.py").read_text())
    folder = tmp_path / "run"
    call = ["eval", "--budgets", "16", "--tasks", "broken", "--output", str(folder)]
    assert stopped([*call, "--include-path", str(tmp_path / "tasks")]) == 1
    said = capsys.readouterr().err
    assert "broken, full at 1: the harness wrote no results" in said
    assert "gone.parquet" in said
    assert "1 runs did not finish, and 1 more were not begun" in said
    assert not (folder / "report.md").exists()
