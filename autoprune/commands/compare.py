"""`autoprune compare`: methods and budgets on the same questions, at the compute that was asked for."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from ..evaluation import Options, Setting, Task, embedded_tasks, read_tasks
from ..evaluation import compare as run_comparison
from ..evaluation.results import Row
from ..evaluation.tables import HEADINGS, by_budget, cells, infeasible
from ..evaluation.workers import default_workers
from ..files import check_folder
from ..loading import load_embedded, load_model
from ..methods import load_method
from ..methods.tuned_file import is_tuned_file
from .inputs import budget_text, build_method, parse_budget, parse_methods
from .report import WIDE, as_options, print_json

QUESTIONS = 200
BUDGETS = "1/2,1/3,1/4,1/6,1/9"
QUICK_QUESTIONS = 30
QUICK_BUDGETS = "1/4,1/9"
_WIDE = ("method", "tokens", "FLOPs", "accuracy", "of full", "agreement", "difference", "prefill")
_NARROW = ("method", "tokens", "FLOPs", "accuracy", "difference")
"""What a wide and a narrow terminal have room for; the report has all columns."""


@dataclass(frozen=True)
class CompareRequest:
    """What to compare and how; None takes the default, which may depend on `quick`."""

    methods: str
    output: Path
    budgets: str | None = None
    questions: int | None = None
    kinds: Sequence[str] | None = None
    seed: int = 0
    model: str | None = None
    tasks: Path | None = None
    baseline: str | None = None
    batch_size: int = 64
    workers: int | None = None
    device: str = "auto"
    dtype: str = "auto"
    timing: bool = True
    quick: bool = False
    as_json: bool = False


def compare(request: CompareRequest, console: Console) -> None:
    """Run the comparison, or continue it, and print the table; exit code 130 after Ctrl-C.

    Raises:
        ValueError: bad input; see `parse_methods`, `parse_budgets`, `read_tasks` and
            `evaluation.compare`.
        UnsupportedError: a model that cannot be pruned.
    """
    settings = list(_settings(request))
    check_folder(request.output)
    with Console(stderr=True).status("reading the questions"):
        tasks = _tasks(request)
    where = (request.device, request.dtype)
    loaded = load_embedded(*where) if request.model is None else load_model(request.model, *where)
    options = Options(
        batch_size=request.batch_size,
        workers=request.workers or default_workers(loaded.model.device),
        baseline=request.baseline,
        model_name=loaded.name,
        timing=request.timing,
        command=_command(request),
        show_progress=True,
    )
    try:
        rows = run_comparison(
            loaded.model, loaded.processor, settings, tasks, request.output, options
        )
    except KeyboardInterrupt:
        Console(stderr=True).print(
            f"autoprune: stopped; the same command continues in {str(request.output)!r}",
            markup=False,
            soft_wrap=True,
        )
        raise SystemExit(130) from None
    if request.as_json:
        print_json(console, rows)
    else:
        _show(rows, request.output, console)


def parse_budgets(text: str) -> list[str]:
    """The budgets of "1/2,64", each as `parse_budget` takes it.

    Raises:
        ValueError: one of them is none, or there are none.
    """
    budgets = [part.strip() for part in text.split(",") if part.strip()]
    for budget in budgets:
        parse_budget(budget)
    if not budgets:
        raise ValueError("--budgets is empty; give some by commas, such as 1/4,1/9")
    return list(dict.fromkeys(budgets))


def _settings(request: CompareRequest) -> Iterator[Setting]:
    methods = parse_methods("--methods", request.methods)
    for _, name, options in methods:
        # Without its budget a method only fails on what is wrong with it.
        build_method(name, None if is_tuned_file(name) else parse_budget("64"), {}, options)
    for label, name, options in methods:
        for budget in _budgets(request, [name for _, name, _ in methods]):
            try:
                method = build_method(name, parse_budget(budget), {}, options)
            except ValueError as error:
                yield Setting(label, budget, None, str(error))
            else:
                yield Setting(label, budget, method)


def _budgets(request: CompareRequest, methods: Sequence[str]) -> list[str]:
    """Those asked for; else those of the tuned settings, if there are any; else the usual ones."""
    if request.budgets is not None:
        return parse_budgets(request.budgets)
    tuned = [budget_text(load_method(name).budget) for name in methods if is_tuned_file(name)]
    usual = QUICK_BUDGETS if request.quick else BUDGETS
    return list(dict.fromkeys(tuned)) or parse_budgets(usual)


def _tasks(request: CompareRequest) -> list[Task]:
    questions = request.questions
    if questions is None and request.quick:
        questions = QUICK_QUESTIONS
    if request.tasks is not None:
        return read_tasks(request.tasks, questions, request.kinds)
    return embedded_tasks(
        QUESTIONS if questions is None else questions, request.kinds, request.seed
    )


def _command(request: CompareRequest) -> str:
    """The call as one would type it."""
    words = ["autoprune", "compare"]
    for field in dataclasses.fields(request):
        value, option = getattr(request, field.name), f"--{field.name.replace('_', '-')}"
        if value == field.default or field.name in ("as_json", "timing", "quick"):
            continue
        words += [option, ",".join(value) if field.name == "kinds" else str(value)]
    flags = {"--quick": request.quick, "--no-timing": not request.timing}
    return shlex.join([*words, *(flag for flag, given in flags.items() if given)])


def _show(rows: Sequence[Row], output: Path, console: Console) -> None:
    shown = _WIDE if console.width >= WIDE else _NARROW
    table = Table(show_edge=False, pad_edge=False)
    for heading in ("budget", *shown):
        text = heading in ("budget", "method")
        table.add_column(
            heading,
            justify="left" if text else "right",
            overflow="fold",
            no_wrap=heading != "method",
        )
    for budget, group in [("1", rows[:1]), *by_budget(rows)]:
        for index, row in enumerate(group):
            named = dict(zip(HEADINGS, cells(row, brief=True), strict=True))
            table.add_row("" if index else budget, *(named[heading] for heading in shown))
        table.add_section()
    console.print(table)
    console.print("*: the difference to the baseline is larger than chance explains (95 %)")
    for line in infeasible(rows):
        console.print(f"infeasible: {as_options(line, budget='', setting='the method :')}")
    console.print(f"Report, predictions and plot: {output}", soft_wrap=True)
