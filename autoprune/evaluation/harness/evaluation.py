"""Benchmarks of the harness under every setting, the unpruned model first; one report."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import transformers

from ... import __version__
from ...errors import UnsupportedError
from ...files import write_whole
from ..comparison import code_of
from ..progress import progress_bar
from ..report import check_plotting, to_markdown, write_report
from ..results import Row, results
from ..run_directory import Answers, RunDirectory
from ..settings import REFERENCE, Setting
from .outputs import Output
from .runs import Failed, Harness, Job, finished, run
from .scores import Score, scores, to_text

Outputs = dict[str, Output]
"""Of one setting, by task."""


class Incomplete(Exception):
    """Runs that did not finish; what did is kept, and the same call continues.

    failures: each with the end of its log.
    """

    def __init__(self, failures: Sequence[Failed], skipped: int):
        self.failures = failures
        rest = f", and {skipped} more were not begun" if skipped else ""
        super().__init__(f"{len(failures)} runs did not finish{rest}")


@dataclass(frozen=True)
class Evaluation:
    """What to run and how.

    Args:
        suite: whose published figures stand beside; "" for none.
        model_name: how the model is called in the report.
        baseline: label that the others are compared with.
        command: how the evaluation is called in its report.
    """

    harness: Harness
    tasks: Sequence[str]
    suite: str
    model_name: str
    baseline: str
    command: str
    show_progress: bool = False


@dataclass
class Found:
    """What ran, by setting; the reason where one was refused."""

    outputs: dict[Setting, Outputs] = field(default_factory=dict)
    refusals: dict[Setting, str] = field(default_factory=dict)
    failures: list[Failed] = field(default_factory=list)
    skipped: int = 0


def evaluate(
    jobs: Sequence[Job], refused: Mapping[Setting, str], directory: Path, wanted: Evaluation
) -> tuple[list[Row], list[Score]]:
    """Run what is not finished yet, and write the report.

    The folder receives config.json, runs/, predictions/, results.csv, results.json, scores.json, report.md
    and accuracy_vs_flops.png.

    Args:
        jobs: the unpruned model first.
        refused: settings that cannot run at all, and why.

    Returns:
        Rows as `evaluation.compare` gives them, over the tasks that judge each answer by itself, if there are
        any; and the harness's own scores of all tasks.

    Raises:
        Incomplete: a run failed.
        UnsupportedError: the model cannot be pruned at all.
        ValueError: a folder of something else.
        ImportError: matplotlib is missing.
    """
    check_plotting()
    compared, noted = _compared(wanted), _noted(wanted)
    run_directory = RunDirectory(directory, compared, noted)
    found = _run_all(jobs, directory, wanted)
    if found.failures:
        raise Incomplete(found.failures, found.skipped)
    if REFERENCE in found.refusals:
        raise UnsupportedError(found.refusals[REFERENCE])
    found.refusals |= refused
    settings = [job.setting for job in jobs] + list(refused)
    ran = [setting for setting in settings if setting not in found.refusals]
    table = scores(ran, found.outputs, wanted.suite)
    rows = _rows(settings, found, run_directory, wanted)
    config = {"compared": compared, **noted, **_asked(found, wanted)}
    text = to_text(table, wanted.tasks, wanted.suite)
    if rows:
        write_report(directory, rows, config, wanted.baseline)
        text = f"{to_markdown(rows, config, wanted.baseline)}\n{text}"
    else:
        # Those of an earlier call in this folder tell of other tasks.
        for name in OF_ANSWERS:
            (directory / name).unlink(missing_ok=True)
    write_whole(directory / "report.md", text)
    write_whole(directory / "scores.json", json.dumps(table, indent=1, allow_nan=False))
    return rows, table


OF_ANSWERS = ("results.csv", "results.json", "report.html", "accuracy_vs_flops.png")
"""What a report holds only where a task judges each answer by itself."""


def _run_all(jobs: Sequence[Job], directory: Path, wanted: Evaluation) -> Found:
    found, lost = Found(), set[str]()
    with progress_bar(wanted.show_progress) as progress:
        bar = progress.add_task("", total=len(jobs) * len(wanted.tasks))
        for job in jobs:
            for task in wanted.tasks:
                name = f"{job.setting.label} at {job.setting.budget}: {task}"
                if task in lost:
                    found.skipped += 1
                elif job.setting not in found.refusals:

                    def show(answers: int, name: str = name) -> None:
                        progress.update(bar, description=f"{name}, {answers} answers")

                    show(0)
                    _run_one(job, task, directory, wanted, found, show)
                    if job.setting is REFERENCE and found.failures:
                        # What the unpruned model cannot answer, nobody is asked.
                        lost.update(failure.task for failure in found.failures)
                progress.advance(bar)
    return found


def _run_one(
    job: Job, task: str, directory: Path, wanted: Evaluation, found: Found, show: Any
) -> None:
    place = directory / "runs" / job.setting.name / task
    output = finished(place, task, job.fingerprint)
    try:
        if output is None:
            output = run(wanted.harness, job, task, place, show)
    except Failed as failure:
        found.failures.append(failure)
        return
    if isinstance(output, str):
        found.refusals[job.setting] = output
    else:
        found.outputs.setdefault(job.setting, {})[task] = output


def fingerprint_of(setting: Setting) -> str:
    """Equal for a method with the same settings and code."""
    return f"{setting.method!r} {code_of(type(setting.method))}"


def _rows(
    settings: Sequence[Setting], found: Found, run_directory: RunDirectory, wanted: Evaluation
) -> list[Row]:
    """Over the tasks that judge each answer by itself, by the code that `compare` uses."""
    kinds = [task for task in wanted.tasks if _judged_one_by_one(task, found)]
    if not kinds:
        return []
    given: list[Answers | None] = []
    for setting in settings:
        if setting in found.refusals:
            given.append(None)
            continue
        outputs = found.outputs[setting]
        records = [record for kind in kinds for record in outputs[kind].answers]
        lines = "".join(json.dumps(record, allow_nan=False) + "\n" for record in records)
        write_whole(run_directory.predictions(setting), lines)
        given.append(run_directory.read(setting))
    return results(settings, given, kinds, found.refusals, wanted.baseline)


def _judged_one_by_one(task: str, found: Found) -> bool:
    return all(
        record["correct"] is not None
        for setting, outputs in found.outputs.items()
        if setting not in found.refusals
        for record in outputs[task].answers
    )


def _asked(found: Found, wanted: Evaluation) -> dict[str, Any]:
    """How many questions of each task count in the tables of accuracy."""
    full = found.outputs[REFERENCE]
    kinds = {t: len(full[t].answers) for t in wanted.tasks if _judged_one_by_one(t, found)}
    return {"questions": sum(kinds.values()), "kinds": kinds}


def _compared(wanted: Evaluation) -> dict[str, Any]:
    """What decides the answers of every run; tasks and settings may be added later."""
    harness = wanted.harness
    return {
        "model": {"name": wanted.model_name, **harness.arguments},
        "limit": harness.limit,
        "seed": harness.seed,
        "version": {
            "autoprune": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "lmms-eval": _harness_version(),
        },
    }


def _harness_version() -> str:
    try:
        return version("lmms-eval")
    except PackageNotFoundError:
        return "not installed"


def _noted(wanted: Evaluation) -> dict[str, Any]:
    where = platform.machine()
    if torch.cuda.is_available():
        where = torch.cuda.get_device_name()
    return {
        "command": wanted.command,
        "machine": f"{where}, batches of {wanted.harness.batch_size}",
        "python": platform.python_version(),
    }
