"""An evaluation over several tasks and settings, with processes that only pretend to be the harness."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from autoprune.errors import UnsupportedError
from autoprune.evaluation.harness import runs
from autoprune.evaluation.harness.evaluation import (
    Evaluation,
    Incomplete,
    evaluate,
    fingerprint_of,
)
from autoprune.evaluation.harness.runs import Job
from autoprune.evaluation.settings import REFERENCE, Setting
from autoprune.methods.fastv import FastV

from .harness_files import Pretended

RIGHT = "write_results(folder, [1] * 12, task, entering=576)"
WORSE = "write_results(folder, [1, 0, 1] * 4, task)"
FASTV = Setting("fastv", "64", FastV(64))
OTHER = Setting("fastv", "32", FastV(32))


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes that end at once are looked after more often than those of a real run."""
    monkeypatch.setattr(runs, "_POLL", 0.02)


def wanted(tasks: str = "pope,gqa", limit: int | None = None) -> Evaluation:
    harness: Any = Pretended({"pretrained": "X"}, 8, limit, 0, None)
    return Evaluation(harness, tasks.split(","), "", "X", "fastv", "autoprune eval")


def job(setting: Setting, does: str) -> Job:
    return Job(setting, {"does": does}, fingerprint_of(setting))


def calls(folder: Path, setting: Setting) -> int:
    return len((folder / "runs" / setting.name / "called").read_text())


def test_rows_and_scores_are_of_the_same_answers(tmp_path: Path):
    folder = tmp_path / "run"
    rows, table = evaluate([job(REFERENCE, RIGHT), job(FASTV, WORSE)], {}, folder, wanted())
    full, fastv = rows
    assert full["accuracy"] == 1
    assert fastv["accuracy"] == pytest.approx(2 / 3, abs=1e-6)
    assert fastv["accuracy_pope"] == fastv["accuracy_gqa"] == fastv["accuracy"]
    assert fastv["accuracy_low"] < fastv["accuracy"] < fastv["accuracy_high"]
    assert fastv["tokens_entering"] == table[1]["tokens_entering"] == 16
    # The harness's score here is its accuracy, or for POPE the F1 that stands for half of it.
    assert table[1]["tasks"]["gqa"]["score"] == pytest.approx(2 / 3)
    assert table[1]["tasks"]["pope"]["score"] == pytest.approx(1 / 3)
    assert table[1]["relative"] == pytest.approx(2 / 3)
    text = (folder / "report.md").read_text()
    assert "24 questions: 12 pope, 12 gqa" in text
    assert "| fastv | 64 | 16 | 25.0% | 25.0% | 66.7% | 100.0% |" in text
    assert json.loads((folder / "scores.json").read_text()) == table


def test_what_is_finished_is_not_run_again_and_more_may_be_asked(tmp_path: Path):
    folder = tmp_path / "run"
    jobs = [job(REFERENCE, RIGHT), job(FASTV, WORSE)]
    evaluate(jobs, {}, folder, wanted("pope"))
    rows, _ = evaluate([*jobs, job(OTHER, WORSE)], {}, folder, wanted("pope,gqa"))
    assert [row["budget"] for row in rows] == ["1", "64", "32"]
    assert calls(folder, REFERENCE) == calls(folder, FASTV) == calls(folder, OTHER) == 2
    with pytest.raises(ValueError, match="limit was None and is 5"):
        evaluate(jobs, {}, folder, wanted("pope", limit=5))
    # The same label with other settings is another method.
    changed = Setting("fastv", "64", FastV(64, layer=3))
    evaluate([jobs[0], job(changed, WORSE)], {}, folder, wanted("pope"))
    assert calls(folder, FASTV) == 3


def test_a_refused_setting_is_a_row_that_says_why(tmp_path: Path):
    small = "(folder / 'costs.jsonl.refused').write_text('the budget is too small')"
    never = Setting("fastv", "0.1", None, "no such budget")
    rows, table = evaluate(
        [job(REFERENCE, RIGHT), job(FASTV, WORSE), job(OTHER, small)],
        {never: never.refusal},
        tmp_path / "run",
        wanted(),
    )
    assert [row["status"] for row in rows] == ["ok", "ok", "infeasible", "infeasible"]
    assert [row["reason"] for row in rows[2:]] == ["the budget is too small", "no such budget"]
    assert [score["budget"] for score in table] == ["1", "64"]
    # What refuses one task is not asked the next.
    assert calls(tmp_path / "run", OTHER) == 1


def test_a_run_that_fails_lets_the_others_go_on_and_is_no_result(tmp_path: Path):
    folder = tmp_path / "run"
    fails = f"{RIGHT} if task == 'gqa' else print('away')"
    with pytest.raises(
        Incomplete, match="1 runs did not finish, and 1 more were not begun"
    ) as all_:
        evaluate([job(REFERENCE, fails), job(FASTV, WORSE)], {}, folder, wanted())
    (failure,) = all_.value.failures
    assert failure.task == "pope"
    assert failure.last_lines() == ["away"]
    assert not (folder / "report.md").exists()
    assert calls(folder, FASTV) == 1
    evaluate([job(REFERENCE, RIGHT), job(FASTV, WORSE)], {}, folder, wanted())
    # Only what had failed, and what had not begun.
    assert calls(folder, REFERENCE) == 3
    assert calls(folder, FASTV) == 2


def test_tasks_that_judge_only_the_whole_have_scores_and_no_rows(tmp_path: Path):
    folder = tmp_path / "run"
    jobs = [
        job(own, does.replace("task", "task, judged=False", 1))
        for own, does in ((REFERENCE, RIGHT), (FASTV, WORSE))
    ]
    evaluate([job(REFERENCE, RIGHT), job(FASTV, WORSE)], {}, folder, wanted("pope"))
    assert (folder / "report.html").exists()
    rows, table = evaluate(jobs, {}, folder, wanted("coco_val"))
    assert rows == []
    # What an earlier call has written of other tasks is gone.
    assert not [path for path in folder.iterdir() if path.suffix in (".html", ".csv", ".png")]
    assert [score["tasks"]["coco_val"]["score"] for score in table] == pytest.approx([1, 2 / 3])
    text = (folder / "report.md").read_text()
    assert text.startswith("## Scores of lmms-eval")
    mixed = [
        job(own, f"write_results(folder, {right}, task, judged=task == 'gqa')")
        for own, right in ((REFERENCE, [1] * 4), (FASTV, [1, 0, 1, 1]))
    ]
    rows, table = evaluate(mixed, {}, tmp_path / "mixed", wanted("gqa,pope"))
    assert rows[1]["accuracy"] == 0.75
    assert rows[1]["questions"] == 4
    assert set(table[1]["tasks"]) == {"gqa", "pope"}


def test_a_model_that_cannot_be_pruned_is_refused(tmp_path: Path):
    no = "(folder / 'costs.jsonl.refused').write_text('this model takes no pictures')"
    with pytest.raises(UnsupportedError, match="this model takes no pictures"):
        evaluate([job(REFERENCE, no), job(FASTV, WORSE)], {}, tmp_path / "run", wanted())
