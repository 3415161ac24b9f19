"""`autoprune eval`: methods and budgets on the field's benchmarks, beside what was published."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from ..evaluation.harness.needs import check_harness, check_needs
from ..evaluation.harness.suites import SHAPES, SUITES, suite_of
from ..evaluation.settings import FULL, REFERENCE, Setting, with_reference
from ..evaluation.shapes import TASK, export_shapes
from ..files import check_folder
from ..methods.autoprune import AutoPrune
from .compare import CompareRequest, compare, parse_budgets
from .inputs import build_method, parse_budget, parse_methods
from .report import as_options, print_json

BUDGETS = "1/3,2/9,1/9"
"""Where tasks are named and no suite has budgets of its own."""
EXPORTED = 20
"""Questions of each kind in an export, where --limit says nothing."""


@dataclass(frozen=True)
class EvalRequest:
    """What to evaluate and how; None takes the default of the suite."""

    methods: str
    output: Path
    model: str | None = None
    budgets: str | None = None
    suite: str | None = None
    tasks: str | None = None
    limit: int | None = None
    seed: int = 0
    batch_size: int = 8
    include_path: Path | None = None
    baseline: str | None = None
    device: str = "auto"
    dtype: str = "auto"
    timing: bool = True
    as_json: bool = False


def evaluate(request: EvalRequest, console: Console) -> None:
    """Run the suite, or continue it, and print the table; exit code 1 if a run failed, 130 after Ctrl-C.

    Raises:
        ValueError: bad input, or tasks that need something that is not there; all of it is named before
            anything starts.
        ImportError: the harness is not installed.
    """
    if request.suite is not None and request.tasks is not None:
        raise ValueError("give --suite or --tasks, not both")
    own = Path(request.tasks) if request.tasks and request.tasks.endswith(".jsonl") else None
    if own is not None or (request.tasks is None and request.suite in (None, SHAPES)):
        compare(_as_comparison(request, own), console)
        return
    suite = None if request.suite is None else suite_of(request.suite)
    tasks = suite.tasks if suite else _names(request.tasks)
    check_needs(tasks)
    check_folder(request.output)
    budgets = parse_budgets(request.budgets or (",".join(suite.budgets) if suite else BUDGETS))
    _run_harness(request, tasks, budgets, suite.name if suite else "", console)


def list_suites(console: Console) -> None:
    """Print what there is to run."""
    table = Table()
    for heading in ("suite", "what", "tasks", "budgets"):
        table.add_column(heading, overflow="fold")
    for suite in SUITES.values():
        tasks = ", ".join(suite.tasks) or "drawn scenes"
        table.add_row(suite.name, suite.about, tasks, ", ".join(suite.budgets))
    console.print(table)


def export(folder: Path, limit: int | None, seed: int, console: Console) -> None:
    """Write the embedded model's questions as a data set, and print how the harness asks them."""
    path = export_shapes(folder, limit or EXPORTED, seed=seed)
    console.print(f"Questions with pictures: {path}", soft_wrap=True)
    words = ["lmms-eval", "--model", "autoprune", "--model_args", "pretrained=embedded,budget=16"]
    words += ["--tasks", TASK, "--include_path", str(folder), "--batch_size", "8"]
    console.print(shlex.join(words), soft_wrap=True)


def _as_comparison(request: EvalRequest, tasks: Path | None) -> CompareRequest:
    """The same for questions that need no harness."""
    return CompareRequest(
        methods=request.methods,
        output=request.output,
        budgets=request.budgets,
        questions=request.limit,
        seed=request.seed,
        model=request.model,
        tasks=tasks,
        baseline=request.baseline,
        batch_size=request.batch_size,
        device=request.device,
        dtype=request.dtype,
        timing=request.timing,
        as_json=request.as_json,
    )


def _names(tasks: str | None) -> list[str]:
    names = list(dict.fromkeys(name.strip() for name in (tasks or "").split(",") if name.strip()))
    if not names:
        raise ValueError("--tasks is empty; give names of lmms-eval by commas, such as gqa,pope")
    return names


def _run_harness(
    request: EvalRequest, tasks: Sequence[str], budgets: Sequence[str], suite: str, console: Console
) -> None:
    check_harness()
    # Only now: the harness is an extra.
    from ..evaluation.harness.evaluation import Evaluation, Incomplete, fingerprint_of
    from ..evaluation.harness.evaluation import evaluate as run_evaluation
    from ..evaluation.harness.runs import Harness, Job

    pairs = list(_settings(request, budgets))
    settings = with_reference([setting for setting, _ in pairs])
    jobs = [Job(REFERENCE, {"method": FULL}, fingerprint_of(REFERENCE))]
    jobs += [Job(own, words, fingerprint_of(own)) for own, words in pairs if own.method is not None]
    labels = [setting.label for setting in settings[1:]]
    wanted = Evaluation(
        harness=Harness(
            _model_args(request),
            request.batch_size,
            request.limit,
            request.seed,
            request.include_path,
        ),
        tasks=tasks,
        suite=suite,
        model_name="embedded model" if request.model is None else Path(request.model).name,
        baseline=_baseline(request.baseline, labels),
        command=_command(request),
        show_progress=True,
    )
    refused = {own: own.refusal for own, _ in pairs if own.method is None}
    try:
        rows, table = run_evaluation(jobs, refused, request.output, wanted)
    except Incomplete as error:
        _show_failures(error, request.output)
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        _say(f"stopped; the same command continues in {str(request.output)!r}")
        raise SystemExit(130) from None
    if request.as_json:
        print_json(console, {"scores": table, "rows": rows})
    else:
        _show(table, rows, tasks, request.output, console)


def _settings(
    request: EvalRequest, budgets: Sequence[str]
) -> Iterator[tuple[Setting, dict[str, str]]]:
    """Every method under every budget, and how the plugin is told of it."""
    methods = parse_methods("--methods", request.methods)
    for _, name, options in methods:
        build_method(name, None if name.endswith(".json") else parse_budget("64"), {}, options)
    for label, name, options in methods:
        for budget in budgets:
            given = dict(option.split("=", 1) for option in options)
            words = {"method": name, "budget": budget, **given}
            try:
                method = build_method(name, parse_budget(budget), {}, options)
            except ValueError as error:
                yield Setting(label, budget, None, str(error)), {}
            else:
                yield Setting(label, budget, method), words


def _model_args(request: EvalRequest) -> dict[str, str]:
    given = {"pretrained": request.model or "embedded", "dtype": request.dtype}
    return given if request.device == "auto" else {**given, "device": request.device}


def _baseline(asked: str | None, labels: Sequence[str]) -> str:
    if asked is None:
        return AutoPrune.name if AutoPrune.name in labels else labels[0]
    if asked not in labels:
        listed = ", ".join(dict.fromkeys(labels))
        raise ValueError(f"the baseline {asked!r} is not compared; choose one of {listed}")
    return asked


def _command(request: EvalRequest) -> str:
    """The call as one would type it."""
    words = ["autoprune", "eval"]
    for field in dataclasses.fields(request):
        value = getattr(request, field.name)
        if value != field.default and field.name not in ("as_json", "timing"):
            words += [f"--{field.name.replace('_', '-')}", str(value)]
    return shlex.join(words)


def _show_failures(error: Exception, output: Path) -> None:
    for failure in error.failures:  # type: ignore[attr-defined]
        _say(str(failure))
        for line in failure.last_lines():
            _say(line, indent="    ")
    _say(f"{error}; what finished is kept, and the same command continues in {str(output)!r}")


def _say(text: str, indent: str = "autoprune: ") -> None:
    Console(stderr=True).print(f"{indent}{text}", markup=False, highlight=False, soft_wrap=True)


def _show(
    table: Sequence[dict[str, object]],
    rows: Sequence[dict[str, object]],
    tasks: Sequence[str],
    output: Path,
    console: Console,
) -> None:
    from ..evaluation.harness.scores import columns
    from ..evaluation.report import infeasible

    shown = Table(show_edge=False, pad_edge=False)
    found = columns(table, tasks)
    for heading in found:
        text = heading in ("method", "budget")
        shown.add_column(heading, justify="left" if text else "right", overflow="fold")
    for line in zip(*found.values(), strict=True):
        shown.add_row(*line)
    console.print(shown)
    for reason in infeasible(rows):
        console.print(f"infeasible: {as_options(reason, budget='', setting='the method :')}")
    console.print(f"Report, answers and logs: {output}", soft_wrap=True)
