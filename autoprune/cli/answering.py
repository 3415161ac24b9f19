"""`autoprune demo`, `run`, `explain` and `plan`: one prompt, or none."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer
from typer.core import TyperCommand

from .options import (
    K0,
    X0,
    Budget,
    Compare,
    Device,
    Dtype,
    Gamma,
    Json,
    MaxNewTokens,
    MethodName,
    MethodOrFile,
    Model,
    Settings,
    by_commas,
    console,
    given_options,
    refuse_options,
)

if TYPE_CHECKING:
    from ..methods.autoprune import AutoPrune


_WITH_PAGE = {"model": "--model", "host": "--host", "port": "--port"}
_WITHOUT_PAGE = {
    "seed": "--seed",
    "kinds": "--kinds",
    "output": "--output",
    "settings": "--set",
    "as_json": "--json",
}


def demo(
    context: typer.Context,
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
    web: Annotated[bool, typer.Option("--web", help="Ask in a browser.")] = False,
    model: Annotated[
        str | None,
        typer.Option(
            help="With --web: folder or hub name of a checkpoint; default: embedded model."
        ),
    ] = None,
    host: Annotated[
        str,
        typer.Option(help="With --web: address; others than this machine's own open it to all."),
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="With --web: port.")] = 7860,
) -> None:
    """Draw a picture, ask about it with all and with pruned visual tokens, show what was saved."""
    from ..commands import demo as command
    from ..commands.inputs import build_method, parse_budget

    given = set(given_options(context))
    if web:
        refuse_options(given, _WITHOUT_PAGE, "the page (--web) has no")
        from ..web import serve_page

        asked = parse_budget(budget) if "budget" in given else None
        serve_page(model, method, asked, host, port, console())
        return
    refuse_options(given, _WITH_PAGE, "without --web there is no")
    built = build_method(method, parse_budget(budget), {}, settings or [])
    wanted = by_commas(kinds)
    seed = command.DEFAULT_SEED if seed is None else seed
    command.demo(built, seed, wanted, output, console(), as_json)


class AsksQuestions(TyperCommand):
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
    method: MethodOrFile = "autoprune",
    model: Model = None,
    x0: X0 = None,
    k0: K0 = None,
    gamma: Gamma = None,
    settings: Settings = None,
    max_new_tokens: MaxNewTokens = 64,
    compare: Compare = False,
    picture: Annotated[
        Path | None, typer.Option(help="Write the kept patches to this PNG.")
    ] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    as_json: Json = False,
) -> None:
    """Answer a question about a picture with pruned visual tokens."""
    from ..commands import run as command
    from ..commands.inputs import build_method, parse_budget

    options = {"x0": x0, "k0": k0, "gamma": gamma}
    asked = None if budget is None else parse_budget(budget)
    built = build_method(method, asked, options, settings or [])
    command.run(
        command.Request(
            image, question, built, model, device, dtype, max_new_tokens, compare, as_json, picture
        ),
        console(),
    )


def explain(
    images: Annotated[
        list[str],
        typer.Argument(
            metavar="IMAGE...", help="A picture, or several in their order; - reads standard input."
        ),
    ],
    question: Annotated[str, typer.Argument(help="What to ask about it.")],
    budget: Annotated[
        str | None,
        typer.Option(help="Mean visual tokens per layer, or a share of them (1/9, 11%)."),
    ] = None,
    method: MethodName = "autoprune",
    model: Model = None,
    settings: Settings = None,
    layers: Annotated[
        str | None, typer.Option(help="Layers to draw, by commas; default: three of them.")
    ] = None,
    reference: Annotated[
        str | None,
        typer.Option(help="Least and most information of other prompts, in bits: 0.1,0.9."),
    ] = None,
    output: Annotated[Path, typer.Option(help="Folder for the pictures.")] = Path("explain"),
    report: Annotated[
        Path | None, typer.Option(help="Write one page of all to this HTML file.")
    ] = None,
    dark: Annotated[bool, typer.Option("--dark", help="Pictures on dark paper.")] = False,
    max_new_tokens: MaxNewTokens = 64,
    device: Device = "auto",
    dtype: Dtype = "auto",
    as_json: Json = False,
) -> None:
    """Draw what pruning did to one prompt: kept patches, attention, curve, tokens per layer."""
    from ..commands import explain as command
    from ..commands.explanation import ExplainRequest
    from ..commands.inputs import build_method, parse_budget

    asked = None if budget is None else parse_budget(budget)
    built = build_method(method, asked, {}, settings or [])
    given = {
        "--budget": budget,
        "--method": method,
        "--model": model,
        "--set": settings,
        "--layers": layers,
        "--reference": reference,
        "--output": output,
        "--report": report,
        "--dark": dark,
        "--max-new-tokens": max_new_tokens,
        "--device": device,
        "--dtype": dtype,
    }
    request = ExplainRequest(
        images[0],
        question,
        built,
        model,
        device,
        dtype,
        max_new_tokens,
        as_json=as_json,
        output=output,
        report=report,
        layers=command.parse_layers(layers),
        reference=command.parse_reference(reference),
        dark=dark,
        command=command.command_line(given, images, question),
        others=tuple(images[1:]),
    )
    command.explain(request, console())


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
    from ..commands import plan as command
    from ..commands.inputs import build_method, parse_budget

    options: dict[str, Any] = {"x0": x0, "k0": k0, "gamma": gamma, "curve": curve}
    asked = command.in_convention(convention, parse_budget(budget), visual, layers)
    built = build_method("autoprune", asked, options, settings or [])
    information = command.parse_information(mi, compare_mi)
    planner = cast("AutoPrune", built)
    stated = None if convention is None else command.Stated(convention, parse_budget(budget).value)
    request = command.PlanRequest(
        planner, layers, visual, text, information, output, as_json, stated
    )
    command.plan(request, console())
