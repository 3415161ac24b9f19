"""The command line: `autoprune demo`, `run`, `plan`, `compare`, `tune`, `bench`, `methods`, `families`.

What is imported here is cheap; each command imports what it needs when it runs.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer
from typer.core import TyperCommand

if TYPE_CHECKING:
    from .methods.autoprune import AutoPrune

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Prune the visual tokens of vision-language models under an exact compute budget.",
)

Budget = Annotated[
    str,
    typer.Option(
        "--budget",
        "--target-token-num",
        help="Mean visual tokens per layer (64), or a share of them (1/9, 11%).",
    ),
]
MethodName = Annotated[str, typer.Option(help="See `autoprune methods`.")]
X0 = Annotated[float | None, typer.Option("--x0", help="Midpoint of the curve, in layers (of 32).")]
K0 = Annotated[float | None, typer.Option("--k0", help="Slope of the curve without information.")]
Gamma = Annotated[float | None, typer.Option(help="How much one bit of information flattens it.")]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="NAME=VALUE", help="Another option of the method; repeatable."),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


def _show_version(asked: bool) -> None:
    if asked:
        from . import __version__

        print(f"autoprune {__version__}")
        raise typer.Exit


@app.callback()
def common(
    debug: Annotated[bool, typer.Option("--debug", help="Show where an error arose.")] = False,
    version: Annotated[
        bool,
        typer.Option("--version", help="Show the version.", callback=_show_version, is_eager=True),
    ] = False,
) -> None:
    """Options of every command; `--debug` is acted on in `main`, wherever it stands."""


@app.command()
def demo(
    budget: Budget = "16",
    method: MethodName = "autoprune",
    seed: Annotated[int | None, typer.Option(min=0, help="Which picture to draw.")] = None,
    kinds: Annotated[
        str | None,
        typer.Option(help="Kinds of questions, by commas; default: the easy and hard ones."),
    ] = None,
    output: Annotated[Path, typer.Option(help="Folder for the picture.")] = Path("demo"),
    settings: Settings = None,
    as_json: Json = False,
) -> None:
    """Draw a picture, ask about it with all and with pruned visual tokens, show what was saved."""
    from .commands import demo as command
    from .commands.inputs import build_method, parse_budget

    built = build_method(method, parse_budget(budget), {}, settings or [])
    wanted = None if kinds is None else [kind.strip() for kind in kinds.split(",") if kind.strip()]
    seed = command.DEFAULT_SEED if seed is None else seed
    command.demo(built, seed, wanted, output, _console(), as_json)


class _AsksQuestions(TyperCommand):
    """A command that takes a question, which may begin with a dash as an option does."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, self._questions_last(args))

    def _questions_last(self, args: list[str]) -> list[str]:
        """Options first, then what is none, behind "--" if it could be mistaken for one."""
        takes_value = {
            name
            for param in self.params
            if not getattr(param, "is_flag", False)
            for name in param.opts
        }
        options: list[str] = []
        others: list[str] = []
        words = iter(args)
        for word in words:
            if word == "--":
                others += words
            elif word in takes_value:
                options += [word, *[value for value in [next(words, None)] if value is not None]]
            elif _OPTION.fullmatch(word):
                options.append(word)
            else:
                others.append(word)
        if any(word.startswith("-") and word != "-" for word in others):
            return [*options, "--", *others]
        return args


_OPTION = re.compile(r"--?[a-zA-Z][\w-]*(=.*)?", re.DOTALL)


@app.command(cls=_AsksQuestions)
def run(
    image: Annotated[str, typer.Argument(help="A picture; - reads standard input.")],
    question: Annotated[str, typer.Argument(help="What to ask about it.")],
    budget: Annotated[
        str | None,
        typer.Option(
            "--budget",
            "--target-token-num",
            help="Mean visual tokens per layer, or a share of them (1/9, 11%); default: 64, or "
            "what was tuned for.",
        ),
    ] = None,
    method: Annotated[
        str, typer.Option(help="See `autoprune methods`; or a tuned.json of `autoprune tune`.")
    ] = "autoprune",
    model: Annotated[
        str | None,
        typer.Option(help="Folder or hub name of a checkpoint; default: the embedded model."),
    ] = None,
    x0: X0 = None,
    k0: K0 = None,
    gamma: Gamma = None,
    settings: Settings = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Length of the answer at most.")] = 64,
    compare: Annotated[
        bool, typer.Option("--compare", help="Also answer without pruning.")
    ] = False,
    picture: Annotated[
        Path | None, typer.Option(help="Write the kept patches to this PNG.")
    ] = None,
    device: Annotated[
        str, typer.Option(help="cpu, cuda, cuda:1 ...; auto takes a GPU if there is one.")
    ] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    as_json: Json = False,
) -> None:
    """Answer a question about a picture with pruned visual tokens."""
    from .commands import run as command
    from .commands.inputs import build_method, parse_budget

    options = {"x0": x0, "k0": k0, "gamma": gamma}
    asked = None if budget is None else parse_budget(budget)
    built = build_method(method, asked, options, settings or [])
    command.run(
        command.Request(
            image, question, built, model, device, dtype, max_new_tokens, compare, as_json, picture
        ),
        _console(),
    )


@app.command()
def plan(
    layers: Annotated[int, typer.Option(help="Decoder layers.")] = 32,
    visual: Annotated[int, typer.Option(help="Visual tokens of the prompt.")] = 576,
    budget: Budget = "64",
    mi: Annotated[
        float,
        typer.Option(
            help="Mutual information of the prompt in bits: much in easy ones, little in hard."
        ),
    ] = 0.5,
    compare_mi: Annotated[str | None, typer.Option(help="More of them: 0.1,1.0.")] = None,
    curve: Annotated[str, typer.Option(help="Retention over depth.")] = "logistic",
    text: Annotated[int, typer.Option(help="Other tokens of the prompt.")] = 64,
    convention: Annotated[
        str | None,
        typer.Option(
            help="What the budget counts, as papers state it: fastv, pdrop, sparsevlm, visionzip, "
            "entering or leaving."
        ),
    ] = None,
    x0: X0 = None,
    k0: K0 = None,
    gamma: Gamma = None,
    settings: Settings = None,
    output: Annotated[Path | None, typer.Option(help="Plot to this PNG.")] = None,
    as_json: Json = False,
) -> None:
    """Show the schedule that AutoPrune would follow, without a model."""
    from .commands import plan as command
    from .commands.inputs import build_method, parse_budget

    options: dict[str, Any] = {"x0": x0, "k0": k0, "gamma": gamma, "curve": curve}
    asked = command.in_convention(convention, parse_budget(budget), visual, layers)
    built = build_method("autoprune", asked, options, settings or [])
    information = command.parse_information(mi, compare_mi)
    planner = cast("AutoPrune", built)
    stated = None if convention is None else command.Stated(convention, parse_budget(budget).value)
    request = command.PlanRequest(
        planner, layers, visual, text, information, output, as_json, stated
    )
    command.plan(request, _console())


@app.command()
def methods(
    name: Annotated[str | None, typer.Argument(help="Explain this one.")] = None,
    as_json: Json = False,
) -> None:
    """List the pruning methods, or explain one and its options."""
    from .commands import methods as command

    if name is None:
        command.methods(_console(), as_json)
    else:
        command.explain(name, _console(), as_json)


@app.command()
def families(
    as_json: Json = False,
    as_markdown: Annotated[
        bool, typer.Option("--markdown", help="Print the table of the README.")
    ] = False,
) -> None:
    """List the families of models that are supported, and what is checked of each."""
    from .commands import families as command

    command.families(_console(), as_json, as_markdown)


@app.command()
def bench(
    model: Annotated[
        str,
        typer.Option(help="A built-in configuration, or the folder or hub name of a checkpoint."),
    ] = "small",
    method: Annotated[
        str | None,
        typer.Option(
            "--method", "--methods", help="One or more, as for compare; default: autoprune,random."
        ),
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option(
            "--budget",
            "--budgets",
            help="One or more, by commas; default: 192,128,64, of a checkpoint 1/3,2/9,1/9.",
        ),
    ] = None,
    batch: Annotated[str, typer.Option(help="Batch sizes, by commas.")] = "1,8",
    text: Annotated[int, typer.Option(min=2, help="Other tokens of each prompt.")] = 64,
    images: Annotated[int, typer.Option(min=1, help="Pictures of each prompt.")] = 1,
    image: Annotated[
        str | None, typer.Option(help="A picture for a checkpoint; default: random pixels.")
    ] = None,
    question: Annotated[
        str | None, typer.Option(help="A question for a checkpoint, in place of --text.")
    ] = None,
    spread: Annotated[
        float | None,
        typer.Option(
            min=0,
            help="Bits over which the prompts of a batch differ; 0: as measured. Default: 1, of a "
            "checkpoint 0.",
        ),
    ] = None,
    settings: Settings = None,
    device: Annotated[str, typer.Option(help="cpu, cuda ...; auto takes a GPU.")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    attention: Annotated[str, typer.Option(help="Attention backend of transformers.")] = "sdpa",
    threads: Annotated[
        int, typer.Option(min=1, help="CPU threads; with 1, other programs disturb least.")
    ] = 1,
    repeats: Annotated[int | None, typer.Option(min=1, help="Rounds; default: 10.")] = None,
    new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Decoding steps; default: 32.")
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="AutoPrune alone, 3 rounds of 4 steps.")
    ] = False,
    output: Annotated[
        Path | None, typer.Option(help="Folder, or JSON file, for the figures and a plot.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Measure what pruning saves in time and memory, beside what its FLOPs promise."""
    from .commands import bench as command

    request = command.Request(
        model=model,
        method=method,
        budget=budget,
        batch=batch,
        text=text,
        images=images,
        image=image,
        question=question,
        spread=spread,
        settings=tuple(settings or ()),
        device=device,
        dtype=dtype,
        attention=attention,
        threads=threads,
        repeats=repeats,
        new_tokens=new_tokens,
        quick=quick,
        output=output,
        as_json=as_json,
    )
    command.bench(request, _console())


@app.command()
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
    model: Annotated[
        str | None,
        typer.Option(help="Folder or hub name of a checkpoint; default: the embedded model."),
    ] = None,
    tasks: Annotated[
        Path | None, typer.Option(help="JSON lines with image, question, answer and kind.")
    ] = None,
    output: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("compare"),
    baseline: Annotated[
        str | None, typer.Option(help="Whom to compare with; default: autoprune, or the first.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts at a time.")] = 64,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Processes; default on a CPU: one per core, up to 4.")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda ...; auto takes a GPU.")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    timing: Annotated[bool, typer.Option(help="Measure prefill times, too.")] = True,
    quick: Annotated[
        bool, typer.Option("--quick", help="Fewer questions and budgets: a few minutes.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Compare methods and budgets on the same questions; interrupted runs continue."""
    from .commands import compare as command

    wanted = None if kinds is None else [kind.strip() for kind in kinds.split(",") if kind.strip()]
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
    command.compare(request, _console())


@app.command()
def tune(
    budget: Budget = "16",
    model: Annotated[
        str | None,
        typer.Option(help="Folder or hub name of a checkpoint; default: the embedded model."),
    ] = None,
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
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts at a time.")] = 64,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Processes; default on a CPU: one per core, up to 4.")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda ...; auto takes a GPU.")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    timing: Annotated[bool, typer.Option(help="Measure prefill times, too.")] = True,
    as_json: Json = False,
) -> None:
    """Find the best settings for a model at a budget, without labels; interrupted runs continue."""
    from .commands import tune as command

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
    command.run_tune(request, _console())


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command; an error becomes one line on stderr and exit code 2."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    for stream in (sys.stdout, sys.stderr):
        # A terminal that lacks a character of an answer must not turn it into an error.
        getattr(stream, "reconfigure", lambda **_: None)(errors="replace")
    if "--debug" in given:
        app(args=[word for word in given if word != "--debug"])
    try:
        _quiet_libraries()
        app(args=given, prog_name="autoprune")
    except Exception as error:
        print(f"autoprune: {_one_line(error)}", file=sys.stderr)
        sys.exit(2)


def _one_line(error: Exception) -> str:
    from .commands.report import as_options
    from .errors import UnsupportedError

    message = " ".join(str(error).split())
    if isinstance(error, (ValueError, ImportError, OSError, UnsupportedError)) and message:
        return as_options(message)
    return f"unexpected {type(error).__name__}: {message} (add --debug to see where it arose)"


def _quiet_libraries() -> None:
    """Keep the advice of other libraries out of the way of results."""
    import logging
    import os
    import warnings

    from .quiet_imports import NOISY_IMPORTS

    for name in NOISY_IMPORTS:
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    warnings.filterwarnings("default", category=UserWarning, module=r"autoprune\.commands")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")


def _console() -> Any:
    from rich.console import Console

    # Piped output has no width of its own; tables are then given the room they need.
    width = None if sys.stdout.isatty() else 110
    return Console(markup=False, highlight=False, width=width)
