"""`autoprune bench`: what pruning saves in time and memory, beside what its FLOPs promise."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from ..files import check_file, make_folder, write_whole
from ..images import load_image
from ..loading import DTYPES, load_model, pick_device
from ..methods import METHODS
from ..policy.budget import Budget
from .bench_table import show
from .inputs import build_method, parse_budget, parse_methods
from .methods import options
from .report import print_json

if TYPE_CHECKING:
    from ..bench.clock import Clock
    from ..bench.session import Plan
    from ..bench.subjects import Subject

FULL, QUICK = ("autoprune,random", 10, 32), ("autoprune", 3, 4)
"""Methods, rounds, and greedy steps after each prefill."""
BUDGETS, SHARES = "192,128,64", "1/3,2/9,1/9"
"""Of 576 visual tokens, and of those that a checkpoint's prompts have."""
SPREAD = 1.0
"""Bits over which prompts of a batch differ, where the weights are random."""
ALL_TOKENS = 10**6
"""A budget that pays for everything, in the unit that every method takes."""


@dataclass(frozen=True)
class Request:
    """What to measure and how to show it; lists are separated by commas, as they were typed."""

    model: str = "small"
    method: str | None = None
    budget: str | None = None
    batch: str = "1,8"
    text: int = 64
    images: int = 1
    image: str | None = None
    question: str | None = None
    spread: float | None = None
    settings: Sequence[str] = ()
    device: str = "auto"
    dtype: str = "auto"
    attention: str = "sdpa"
    threads: int = 1
    repeats: int | None = None
    new_tokens: int | None = None
    quick: bool = False
    output: Path | None = None
    as_json: bool = False


def bench(request: Request, console: Console) -> None:
    """Measure and show; what can be wrong is checked before a model is built.

    What was measured is shown, whatever ends the measurement. With an output, the figures are in the file
    after every run of the model.

    Raises:
        ValueError: bad input, or a method or budget that does not fit the model, or its memory.
        UnsupportedError: a model that cannot be pruned.
    """
    import torch

    from ..bench.clock import Clock
    from ..bench.results import describe, policy

    plan = _plan(request)
    output = None if request.output is None else _output(request.output)
    torch.set_num_threads(request.threads)
    subject = _subject(request)
    clock = Clock(subject.model.device)
    record = {
        "command": _command(request),
        **describe(subject, clock),
        "repeats": plan.repeats,
        "interrupted": True,
        "new_tokens": plan.steps,
        "spread": _spread(request),
        "policy_seconds": policy(),
        "rows": [],
    }
    try:
        _fill(record, subject, plan, clock, output)
    except KeyboardInterrupt:
        _report(record, request, output, console)
        raise SystemExit(130) from None
    except torch.OutOfMemoryError as error:
        _report(record, request, output, console)
        raise ValueError(
            "the device's memory is used up; what was measured before is kept: give smaller --batch or "
            f"--images, or a smaller --model ({error})"
        ) from error
    except Exception:
        if record["rows"]:
            _report(record, request, output, console)
        raise
    _report(record, request, output, console)


def _fill(
    record: dict[str, Any], subject: Subject, plan: Plan, clock: Clock, output: Path | None
) -> None:
    """Measure; the record, and its file, hold what there is after every run of the model."""
    from ..bench.results import rows
    from ..bench.session import measure

    with _progress() as progress:
        task = progress.add_task(subject.name, total=plan.runs)
        for measured in measure(subject, plan, clock):
            progress.advance(task)
            record["rows"] = rows(measured)
            _write(record, output)
    record["interrupted"] = False
    _write(record, output)


def _write(record: dict[str, Any], output: Path | None) -> None:
    # An earlier file stays until there are figures to take its place.
    if output is not None and record["rows"]:
        write_whole(output, json.dumps(record, indent=1))


def _report(
    record: dict[str, Any], request: Request, output: Path | None, console: Console
) -> None:
    """Plot and show what there is."""
    picture = None if output is None else _plot(record, output)
    if request.as_json:
        print_json(console, record)
    else:
        show(record, [path for path in (output, picture) if path is not None], console)


def _plan(request: Request) -> Plan:
    from ..bench.session import Plan
    from ..bench.variants import Variant, spread_curves

    usual, repeats, steps = QUICK if request.quick else FULL
    chosen = parse_methods("--method", usual if request.method is None else request.method)
    usual_budgets = BUDGETS if _is_built_in(request) else SHARES
    listed = usual_budgets if request.budget is None else request.budget
    budgets = [parse_budget(text) for text in _listed("--budget", listed)]
    _check_labels([label for label, _, _ in chosen])
    common = _settings_of(list(dict.fromkeys(name for _, name, _ in chosen)), request.settings)
    methods = [
        (label, build_method(name, budget, {}, [*common[name], *own]))
        for label, name, own in chosen
        for budget in budgets
    ]
    everything = Budget.tokens(ALL_TOKENS)
    spread = _spread(request)
    if not (math.isfinite(spread) and spread >= 0):
        raise ValueError(f"--spread expects a finite number of bits, 0 or more, got {spread}")
    return Plan(
        batches=[_positive("--batch", text) for text in _listed("--batch", request.batch)],
        pruned=[Variant(label, spread_curves(method, spread)) for label, method in methods],
        keeps_all=[
            Variant(label, build_method(name, everything, {}, [*common[name], *own]))
            for label, name, own in chosen
        ],
        repeats=request.repeats or repeats,
        steps=request.new_tokens or steps,
    )


def _is_built_in(request: Request) -> bool:
    from ..bench.subjects import CONFIGURATIONS

    return request.model in CONFIGURATIONS


def _spread(request: Request) -> float:
    if request.spread is None:
        return SPREAD if _is_built_in(request) else 0.0
    return request.spread


def _check_labels(labels: Sequence[str]) -> None:
    """Raise ValueError where two rows of the tables could not be told apart."""
    from ..bench.variants import OVERHEADS, PLAIN

    for label in labels:
        if not label or label in (PLAIN, *OVERHEADS) or labels.count(label) > 1:
            raise ValueError(
                f"the label {label!r} of a method is empty, taken or given twice; choose another"
            )


def _settings_of(names: Sequence[str], settings: Sequence[str]) -> dict[str, list[str]]:
    """Those of "name=value" that each method has; one that none has is left to all, to be refused."""
    known = {name: options(name) if name in METHODS else {} for name in names}
    own: dict[str, list[str]] = {name: [] for name in names}
    for setting in settings:
        key = setting.partition("=")[0].strip()
        having = [name for name in names if key in known[name]]
        for name in having or names:
            own[name].append(setting)
    return own


def _listed(option: str, text: str) -> list[str]:
    parts = list(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    if not parts:
        raise ValueError(f"{option} expects one or more values separated by commas, got {text!r}")
    return parts


def _positive(option: str, text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise ValueError(f"{option} expects whole numbers of 1 or more, got {text!r}")
    return int(text)


def _output(path: Path) -> Path:
    """The JSON file for `--output`; the plot goes beside it."""
    file = path if path.suffix.lower() == ".json" else make_folder(path) / "bench.json"
    check_file(file)
    return file


def _subject(request: Request) -> Subject:
    import torch

    from ..bench.subjects import CONFIGURATIONS, build, from_checkpoint

    if request.dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {request.dtype!r}")
    built_in = _is_built_in(request)
    if built_in and (request.image is not None or request.question is not None):
        raise ValueError("--image and --question are for a checkpoint; give its folder as --model")
    if request.question is not None and not request.question.strip():
        raise ValueError("the question is empty")
    picture = None if request.image is None else load_image(request.image)
    if built_in:
        device = pick_device(request.device)
        usual = "bfloat16" if device.type == "cuda" else "float32"
        dtype = getattr(torch, usual if request.dtype == "auto" else request.dtype)
        subject = build(request.model, request.text, request.images, device, dtype)
    elif request.images != 1:
        raise ValueError(
            "--images is for the built-in configurations; a checkpoint sees one picture"
        )
    else:
        try:
            loaded = load_model(request.model, request.device, request.dtype)
        except ValueError as error:
            raise ValueError(f"{error}; built in are {', '.join(CONFIGURATIONS)}") from error
        subject = from_checkpoint(loaded, request.text, picture, request.question)
    subject.model.set_attn_implementation(request.attention)
    return subject


def _command(request: Request) -> str:
    """The command that repeats the measurement."""
    words = ["autoprune", "bench"]
    for name, value in vars(request).items():
        if value == getattr(Request, name) or name in ("output", "as_json"):
            continue
        if name == "settings":
            words += [word for setting in value for word in ("--set", setting)]
        else:
            words += [f"--{name.replace('_', '-')}", *([] if value is True else [str(value)])]
    return shlex.join(words)


def _progress() -> Progress:
    columns = (TextColumn("{task.description}"), MofNCompleteColumn(), TimeElapsedColumn())
    console = Console(stderr=True)
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


def _plot(record: dict[str, Any], output: Path) -> Path | None:
    """The plot beside the figures; without matplotlib, a line on stderr that it is left out."""
    from ..bench.plot import plot_speedups
    from ..viz import to_png

    if not any(row["kind"] == "pruned" for row in record["rows"]):
        return None
    path = output.with_suffix(".png")
    try:
        write_whole(path, to_png(plot_speedups(record["rows"], record["model"]["name"])))
    except ImportError as error:
        Console(stderr=True).print(
            f"autoprune: no plot beside {str(output)!r}: {error}", markup=False, soft_wrap=True
        )
        return None
    return path
