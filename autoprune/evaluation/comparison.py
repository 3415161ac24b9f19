"""The comparison itself: every method at every budget, asked the same questions."""

from __future__ import annotations

import hashlib
import inspect
import platform
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from .. import __version__
from ..errors import UnsupportedError
from ..methods.autoprune import AutoPrune
from .answering import Refused, answers
from .batches import Batch, longest_answer, prepare
from .encoding import encoder
from .page import changed_answers
from .progress import progress_bar
from .report import check_plotting, write_report
from .results import Row, check_kinds, results
from .run_directory import RunDirectory
from .settings import REFERENCE, Setting, with_reference
from .tasks import Task, picture_digest
from .timing import prefill_milliseconds, timed_batches
from .workers import check_workers, run_all, threads_of_one


@dataclass(frozen=True)
class Options:
    """How a comparison runs.

    Args:
        batch_size: prompts at a time; the order of the questions and thereby rounding depend on it.
        workers: processes, each with its share of the settings and of the threads; CPU only.
        baseline: label that the others are compared with; default: autoprune, or else
            the first one.
        model_name: how the model is called in the report; default: its class.
        timing: measure prefill times once the answers are there.
        command: how the comparison is called in its report.
        show_progress: a bar on stderr.
    """

    batch_size: int = 64
    workers: int = 1
    baseline: str | None = None
    model_name: str | None = None
    timing: bool = True
    command: str = "autoprune.evaluation.compare"
    show_progress: bool = False


def compare(
    model: Any,
    processor: Any,
    settings: Sequence[Setting],
    tasks: Sequence[Task],
    directory: Path,
    options: Options = Options(),
) -> list[Row]:
    """Ask every task under every setting, and once unpruned; write the report.

    The folder receives config.json, predictions/, results.csv, results.json, report.md, report.html and
    accuracy_vs_flops.png. A call that was interrupted is continued by the same call.

    Args:
        model: in eval mode, on its device.
        settings: methods under budgets; one that cannot run becomes a row that says why.
        tasks: as `embedded_tasks` or `read_tasks` give them.

    Returns:
        One row per setting, the unpruned model first; docs/compare.md explains the columns.

    Raises:
        ValueError: nothing to compare, an unknown baseline, options out of range, kinds that cannot be told
            apart in the results, a folder that holds another comparison, a picture that cannot be read.
        UnsupportedError: the model cannot be pruned at all.
        ImportError: matplotlib is missing.
    """
    check_plotting()
    check_kinds([task.kind for task in tasks])
    whole = with_reference(settings)
    baseline = _baseline(settings, options.baseline)
    check_workers(options.workers, model.device)
    new_tokens = longest_answer(processor, tasks)
    compared = _compared(model, whole, tasks, options, new_tokens)
    noted = _noted(model, tasks, options)
    run_directory = RunDirectory(directory, compared, noted)
    with progress_bar(options.show_progress) as progress:
        bar = progress.add_task("preparing", total=len(tasks))
        batches = prepare(
            model,
            processor,
            tasks,
            options.batch_size,
            on_progress=lambda n: progress.advance(bar, n),
            encode=encoder(model, settings),
            by_length=not any(s.method and s.method.budget.over != "prompt" for s in settings),
        )
    work = _Work(model, processor, batches, new_tokens, run_directory)
    with progress_bar(options.show_progress) as progress:
        done = sum(_count(work.answered(setting)) for setting in whole)
        total = len(whole) * len(tasks)
        bar = progress.add_task("answering", total=total, completed=done)
        run_all(work.answer, whole, options.workers, lambda n: progress.advance(bar, n))
    refusals = {s: reason for s in whole if (reason := run_directory.refusal(s)) is not None}
    ran = [setting for setting in whole if setting not in refusals]
    milliseconds = _timings(work, ran, options) if options.timing else []
    given = [None if setting in refusals else run_directory.read(setting) for setting in whole]
    rows = results(whole, given, list(noted["kinds"]), refusals, baseline, milliseconds)
    asked = [task for batch in batches for task in batch.tasks]
    changes = changed_answers(asked, whole, given)
    write_report(directory, rows, {"compared": compared, **noted}, baseline, changes)
    return rows


@dataclass(frozen=True)
class _Work:
    """What every worker needs."""

    model: Any
    processor: Any
    batches: Sequence[Batch]
    new_tokens: int
    directory: RunDirectory

    def answered(self, setting: Setting) -> Sequence[Batch]:
        """The batches that need not be asked again."""
        return self.batches[: self.directory.answered(setting, self.batches)]

    def answer(self, setting: Setting) -> Iterator[int]:
        """Answer what is not answered yet, giving the number of questions of each batch."""
        rest = self.batches[len(self.answered(setting)) :]
        left = _count(rest)
        try:
            for records in answers(self.model, self.processor, setting, rest, self.new_tokens):
                self.directory.append(setting, records)
                left -= len(records)
                yield len(records)
        except Refused as error:
            if setting is REFERENCE:
                raise UnsupportedError(str(error)) from error
            self.directory.refuse(setting, str(error))
            yield left


def _count(batches: Sequence[Batch]) -> int:
    """How many questions they hold."""
    return sum(len(batch.tasks) for batch in batches)


def _baseline(settings: Sequence[Setting], asked: str | None) -> str:
    labels = list(dict.fromkeys(setting.label for setting in settings))
    if asked is None:
        return AutoPrune.name if AutoPrune.name in labels else labels[0]
    if asked not in labels:
        raise ValueError(
            f"the baseline {asked!r} is not compared; choose one of {', '.join(labels)}"
        )
    return asked


def _compared(
    model: Any,
    settings: Sequence[Setting],
    tasks: Sequence[Task],
    options: Options,
    new_tokens: int,
) -> dict[str, Any]:
    """What decides the answers; a run directory holds one of it."""
    return {
        **decide_answers(model, tasks, options, new_tokens),
        "setting": {f"{s.label} at {s.budget}": repr(s.method) for s in settings},
        "code of": {s.label: code_of(type(s.method)) for s in settings if s.method is not None},
    }


def decide_answers(
    model: Any, tasks: Sequence[Task], options: Options, new_tokens: int
) -> dict[str, Any]:
    """What decides the answers of the plain model: itself, the tasks, and how they are asked."""
    asked = [
        (task.id, task.kind, task.question, task.answers, picture_digest(task)) for task in tasks
    ]
    return {
        "model": {
            "name": options.model_name or type(model).__name__,
            "digest": _digest(
                [parameter.flatten()[:8].tolist() for parameter in model.parameters()]
            ),
        },
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": model.device.type,
        "batch_size": options.batch_size,
        "new_tokens": new_tokens,
        "tasks": {
            **Counter(task.kind for task in tasks),
            "digest": _digest(asked),
        },
        "version": {
            "autoprune": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }


def code_of(method: type) -> str:
    """A digest of the files that a method is written in, its base classes' included."""
    files = dict.fromkeys(cls.__module__ for cls in method.__mro__ if cls is not object)
    return _digest([_source(name) for name in files])


def _source(module: str) -> str:
    try:
        return inspect.getsource(sys.modules[module])
    except (OSError, TypeError, KeyError):
        return module  # typed in by hand


def _digest(content: Any) -> str:
    return hashlib.sha256(repr(content).encode()).hexdigest()[:16]


def _noted(model: Any, tasks: Sequence[Task], options: Options) -> dict[str, Any]:
    """What is good to know of a run and does not decide its answers."""
    where = platform.machine()
    if model.device.type == "cuda":
        where = torch.cuda.get_device_name(model.device)
    return {
        "command": options.command,
        "machine": f"{where}, {torch.get_num_threads()} threads, {options.workers} workers",
        "python": platform.python_version(),
        "questions": len(tasks),
        "kinds": dict(Counter(task.kind for task in tasks)),
    }


def _timings(work: _Work, settings: Sequence[Setting], options: Options) -> list[list[float]]:
    """Prefill milliseconds on some of the prompts, with the threads of one worker."""
    chosen = timed_batches([task for batch in work.batches for task in batch.tasks])
    inputs = [
        batch.inputs()
        for tasks in chosen
        for batch in prepare(work.model, work.processor, tasks, len(tasks))
    ]
    with threads_of_one(options.workers), progress_bar(options.show_progress) as progress:
        bar = progress.add_task("timing", total=len(inputs))
        return prefill_milliseconds(work.model, inputs, settings, lambda: progress.advance(bar))
