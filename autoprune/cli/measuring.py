"""`autoprune compare`, `eval` and `tune`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .options import (
    BatchSize,
    Budget,
    Device,
    Dtype,
    Json,
    Model,
    Timing,
    Workers,
    by_commas,
    console,
)


def compare(
    methods: Annotated[
        str,
        typer.Option(
            "--methods",
            "--method",
            help="By commas, options after a colon: autoprune:k0=0.2,random; all; released; a "
            "tuned.json.",
        ),
    ] = "all",
    budgets: Annotated[
        str | None,
        typer.Option("--budgets", "--budget", help="By commas; default: 1/2,1/3,1/4,1/6,1/9."),
    ] = None,
    questions: Annotated[
        int | None,
        typer.Option(min=1, help="Of each kind; default: 200, or all of the task file."),
    ] = None,
    kinds: Annotated[str | None, typer.Option(help="Kinds of questions, by commas.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Which questions.")] = 0,
    model: Model = None,
    tasks: Annotated[
        Path | None, typer.Option(help="JSON lines with image, question, answer and kind.")
    ] = None,
    output: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("compare"),
    baseline: Annotated[
        str | None, typer.Option(help="Whom to compare with; default: autoprune, or the first.")
    ] = None,
    batch_size: BatchSize = 64,
    workers: Workers = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    timing: Timing = True,
    quick: Annotated[
        bool, typer.Option("--quick", help="Fewer questions and budgets: a few minutes.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Compare methods and budgets on the same questions; interrupted runs continue."""
    from ..commands import compare as command

    wanted = by_commas(kinds)
    request = command.CompareRequest(
        methods=methods,
        budgets=budgets,
        questions=questions,
        kinds=wanted,
        seed=seed,
        model=model,
        tasks=tasks,
        output=output,
        baseline=baseline,
        batch_size=batch_size,
        workers=workers,
        device=device,
        dtype=dtype,
        timing=timing,
        quick=quick,
        as_json=as_json,
    )
    command.compare(request, console())


def evaluate(
    model: Model = None,
    methods: Annotated[
        str, typer.Option("--methods", "--method", help="By commas, as for compare.")
    ] = "autoprune",
    budgets: Annotated[
        str | None,
        typer.Option("--budgets", "--budget", help="By commas; default: those of the suite."),
    ] = None,
    suite: Annotated[
        str | None, typer.Option(help="What to run, see --list; default: shapes.")
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(help="Instead of a suite: tasks of lmms-eval by commas, or a .jsonl file."),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Questions of each task at most.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Which questions of shapes; sampling.")] = 0,
    batch_size: BatchSize = 8,
    output: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("eval"),
    include_path: Annotated[
        Path | None, typer.Option(help="A folder of your own tasks for lmms-eval.")
    ] = None,
    baseline: Annotated[
        str | None, typer.Option(help="Whom to compare with; default: autoprune, or the first.")
    ] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    timing: Timing = True,
    list_suites: Annotated[bool, typer.Option("--list", help="List the suites.")] = False,
    export: Annotated[
        Path | None, typer.Option(help="Write the suite shapes as a data set, and run nothing.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Benchmarks of the field, unpruned and pruned, beside published figures; interrupted runs continue."""
    from ..commands import eval as command

    if list_suites:
        command.list_suites(console())
        return
    if export is not None:
        command.export(export, limit, seed, console())
        return
    request = command.EvalRequest(
        methods=methods,
        output=output,
        model=model,
        budgets=budgets,
        suite=suite,
        tasks=tasks,
        limit=limit,
        seed=seed,
        batch_size=batch_size,
        include_path=include_path,
        baseline=baseline,
        device=device,
        dtype=dtype,
        timing=timing,
        as_json=as_json,
    )
    command.evaluate(request, console())


def tune(
    budget: Budget = "16",
    model: Model = None,
    prompts: Annotated[
        Path | None, typer.Option(help="JSON lines with image and question; no answers needed.")
    ] = None,
    pictures: Annotated[
        Path | None, typer.Option(help="A folder of pictures, with --questions.")
    ] = None,
    questions: Annotated[
        Path | None, typer.Option(help="A question per line, asked about --pictures.")
    ] = None,
    count: Annotated[
        int | None, typer.Option(min=1, help="Prompts at most; default: 800, or the whole file.")
    ] = None,
    trials: Annotated[
        int | None, typer.Option(min=1, help="Settings to try; default: 100.")
    ] = None,
    methods: Annotated[
        str | None, typer.Option("--methods", help="To choose from, by commas; default: all.")
    ] = None,
    fleet: Annotated[
        bool, typer.Option("--fleet", help="Also find the rule by which a batch shares the budget.")
    ] = False,
    seed: Annotated[int, typer.Option(min=0, help="What is held out and what is proposed.")] = 0,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Length of answers at most.")] = 32,
    output: Annotated[Path, typer.Option(help="Folder for the search and tuned.json.")] = Path(
        "tune"
    ),
    batch_size: BatchSize = 64,
    workers: Workers = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    timing: Timing = True,
    as_json: Json = False,
) -> None:
    """Find the best settings for a model at a budget, without labels; interrupted runs continue."""
    from ..commands import tune as command

    request = command.TuneRequest(
        budget=budget,
        output=output,
        model=model,
        prompts=prompts,
        pictures=pictures,
        questions=questions,
        count=count,
        trials=trials,
        methods=methods,
        fleet=fleet,
        seed=seed,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        workers=workers,
        device=device,
        dtype=dtype,
        timing=timing,
        as_json=as_json,
    )
    command.run_tune(request, console())
