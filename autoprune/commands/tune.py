"""`autoprune tune`: the best settings for a model at a budget, found on prompts without labels."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ..evaluation import Task, read_tasks
from ..evaluation.statistics import Estimate
from ..evaluation.workers import default_workers
from ..files import check_folder, write_whole
from ..loading import load_embedded, load_model
from ..tuning import Options, Result, built_in_prompts, folder_prompts, tune
from ..tuning.judgement import Judged
from ..tuning.result import figures
from ..tuning.search import Trial, check_optuna
from ..tuning.split import ENOUGH
from .inputs import parse_budget
from .report import as_options, print_json

PROMPTS = 800
_SHOWN = 8
"""Trials in the terminal, the best ones; trials.csv has all."""


@dataclass(frozen=True)
class TuneRequest:
    """What to tune, on which prompts; None takes the default."""

    budget: str
    output: Path
    model: str | None = None
    prompts: Path | None = None
    pictures: Path | None = None
    questions: Path | None = None
    count: int | None = None
    trials: int | None = None
    methods: str | None = None
    fleet: bool = False
    seed: int = 0
    max_new_tokens: int = 32
    batch_size: int = 64
    workers: int | None = None
    device: str = "auto"
    dtype: str = "auto"
    timing: bool = True
    as_json: bool = False


def run_tune(request: TuneRequest, console: Console) -> None:
    """Tune, or go on tuning, write tuned.json and say what it is worth; exit code 130 after Ctrl-C.

    Raises:
        ValueError: bad input; see `tuning.tune`, `read_tasks` and `folder_prompts`.
        ImportError: optuna is missing.
        UnsupportedError: a model that cannot be pruned.
    """
    check_optuna()
    budget = parse_budget(request.budget)
    check_folder(request.output)
    errors = Console(stderr=True, markup=False, soft_wrap=True)
    with errors.status("reading the prompts"):
        prompts = _prompts(request)
    if len(prompts) < ENOUGH:
        errors.print(
            f"autoprune: {len(prompts)} prompts are few: below {ENOUGH} the search follows chance, and it "
            "takes a large gain to be told from it"
        )
    where = (request.device, request.dtype)
    loaded = load_embedded(*where) if request.model is None else load_model(request.model, *where)
    given = Options(
        seed=request.seed,
        fleet=request.fleet,
        new_tokens=request.max_new_tokens,
        batch_size=request.batch_size,
        workers=request.workers or default_workers(loaded.model.device),
        model_name=loaded.name,
        timing=request.timing,
        command=_command(request),
        show_progress=True,
    )
    if request.trials is not None:
        given = dataclasses.replace(given, trials=request.trials)
    if request.methods is not None:
        names = tuple(name.strip() for name in request.methods.split(",") if name.strip())
        given = dataclasses.replace(given, methods=names)
    try:
        result = tune(loaded.model, loaded.processor, prompts, budget, request.output, given)
    except KeyboardInterrupt:
        errors.print(f"autoprune: stopped; the same command continues in {str(request.output)!r}")
        raise SystemExit(130) from None
    result.file.write(request.output / "tuned.json")
    write_whole(request.output / "trials.csv", _csv(result.trials))
    if request.as_json:
        print_json(console, _record(result))
    else:
        _show(result, request.output / "tuned.json", console)


def _prompts(request: TuneRequest) -> list[Task]:
    """The prompts that were asked for, `count` of them at most."""
    count = PROMPTS if request.count is None else request.count
    if request.prompts is not None:
        if request.pictures is not None or request.questions is not None:
            raise ValueError("give --prompts, or --pictures with --questions, not both")
        found = read_tasks(request.prompts, labelled=False)
        return found if request.count is None else found[:count]
    if (request.pictures is None) != (request.questions is None):
        raise ValueError("--pictures and --questions go together: a folder, and a file of lines")
    if request.pictures is not None and request.questions is not None:
        return folder_prompts(request.pictures, request.questions, count)
    if request.model is not None:
        raise ValueError(
            "the built-in questions are those of the embedded model; give --prompts, or --pictures with "
            "--questions, as your model will see them"
        )
    return built_in_prompts(count, request.seed)


def _command(request: TuneRequest) -> str:
    """The call as one would type it."""
    words = ["autoprune", "tune"]
    for field in dataclasses.fields(request):
        value, option = getattr(request, field.name), f"--{field.name.replace('_', '-')}"
        if value != field.default and field.name not in ("as_json", "timing", "fleet"):
            words += [option, str(value)]
    flags = {"--fleet": request.fleet, "--no-timing": not request.timing}
    return shlex.join([*words, *(flag for flag, given in flags.items() if given)])


def _record(result: Result) -> dict[str, Any]:
    return {
        "chosen": result.chosen.label,
        "verdict": result.verdict,
        "method": result.file.method,
        "budget": dataclasses.asdict(result.file.budget),
        "settings": dict(result.file.settings),
        "judged": {own.label: figures(own) for own in result.judged},
        "rules": None
        if result.rules is None
        else {own.label: figures(own) for own in result.rules},
        "plain_milliseconds": result.plain_milliseconds,
        "trials": [vars(trial) for trial in result.trials],
    }


def _csv(trials: Sequence[Trial]) -> str:
    """A row for each trial."""
    text = io.StringIO()
    names = [field.name for field in dataclasses.fields(Trial)]
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    for trial in trials:
        writer.writerow({**vars(trial), "candidate": json.dumps(trial.candidate)})
    return text.getvalue()


def _show(result: Result, path: Path, console: Console) -> None:
    complete = [trial for trial in result.trials if trial.state == "complete"]
    complete.sort(key=lambda trial: -(trial.value or 0))
    table = _table("trial", "agreement", "KL", "tokens", "FLOPs", "ms", "settings")
    for trial in complete[:_SHOWN]:
        table.add_row(str(trial.number), *_price(trial), _settings(trial))
    console.print(f"The best of {len(result.trials)} trials, on the prompts they were tuned on")
    console.print(table)
    prompts = result.file.prompts
    console.print(
        f"\nOn {prompts['judged_on']} other prompts, about {prompts['pictures_judged_on']} pictures"
    )
    _show_judged(result.judged, "the default", console)
    if result.rules is not None:
        console.print("\nWho gets how much of a batch's budget, on the same prompts")
        _show_judged(result.rules, "the same for all", console)
    if result.plain_milliseconds is not None:
        console.print(f"The plain model takes {result.plain_milliseconds:.3g} ms.")
    console.print(f"\nChosen: {result.chosen.label}; {result.verdict}.", soft_wrap=True)
    console.print(f"{result.chosen.method!r}", soft_wrap=True)
    console.print(f'Written: {path}; AutoPrune.load("{path}"), or --method {path}', soft_wrap=True)


def _show_judged(judged: Sequence[Judged], against: str, console: Console) -> None:
    table = _table("settings", "agreement", "KL", "tokens", "FLOPs", "ms", f"less {against} (95 %)")
    for own in judged:
        if own.agreement is not None:
            table.add_row(own.label, *_price(own), _interval(own.difference))
    console.print(table)
    for own in judged:
        if own.agreement is None:
            console.print(f"{own.label} cannot run: {as_options(own.reason)}", soft_wrap=True)


def _table(*headings: str) -> Table:
    table = Table(show_edge=False, pad_edge=False)
    for heading in headings:
        text = heading in ("settings", "trial")
        table.add_column(heading, justify="left" if text else "right", overflow="fold")
    return table


def _price(own: Any) -> list[str]:
    """Agreement, divergence, tokens, FLOPs and milliseconds of a trial or of what is judged."""
    value = own.agreement
    agreement = f"{value.value:.3f}" if isinstance(value, Estimate) else f"{value:.3f}"
    spent = "-" if own.milliseconds is None else f"{own.milliseconds:.2f}"
    return [
        agreement,
        f"{own.divergence:.3f}",
        f"{own.entering:.4g}",
        f"{own.flops_share:.1%}",
        spent,
    ]


def _settings(trial: Trial) -> str:
    """`autoprune first_cut=peek k0=0.4`."""
    values = {name: value for name, value in trial.candidate.items() if name != "method"}
    listed = (f"{name.rpartition('.')[2]}={value}" for name, value in values.items())
    return " ".join([trial.candidate["method"], *listed])


def _interval(estimate: Estimate | None) -> str:
    if estimate is None:
        return "-"
    if estimate.low is None or estimate.high is None:
        return f"{100 * estimate.value:+.1f}"
    return f"{100 * estimate.value:+.1f} [{100 * estimate.low:+.1f}, {100 * estimate.high:+.1f}]"
