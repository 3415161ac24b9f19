"""Options that several commands share, and what all of them print to."""

from __future__ import annotations

import sys
from collections.abc import Collection, Mapping
from typing import Annotated, Any

import typer

Budget = Annotated[
    str,
    typer.Option(
        "--budget",
        "--target-token-num",
        help="Mean visual tokens per layer (64), or a share of them (1/9, 11%).",
    ),
]
MethodName = Annotated[str, typer.Option(help="See `autoprune methods`.")]
MethodOrFile = Annotated[
    str, typer.Option(help="See `autoprune methods`; or a tuned.json of `autoprune tune`.")
]
X0 = Annotated[float | None, typer.Option("--x0", help="Midpoint of the curve, in layers (of 32).")]
K0 = Annotated[float | None, typer.Option("--k0", help="Slope of the curve without information.")]
Gamma = Annotated[float | None, typer.Option(help="How much one bit of information flattens it.")]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="NAME=VALUE", help="Another option of the method; repeatable."),
]
Model = Annotated[
    str | None,
    typer.Option(help="Folder or hub name of a checkpoint; default: the embedded model."),
]
Device = Annotated[
    str, typer.Option(help="cpu, cuda, cuda:1 ...; auto takes a GPU if there is one.")
]
Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Prompts at a time.")]
Workers = Annotated[
    int | None, typer.Option(min=1, help="Processes; default on a CPU: one per core, up to 4.")
]
Timing = Annotated[bool, typer.Option(help="Measure prefill times, too.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
MaxNewTokens = Annotated[int, typer.Option(min=1, help="Length of the answer at most.")]
Compare = Annotated[bool, typer.Option("--compare", help="Also answer without pruning.")]


def by_commas(text: str | None) -> list[str] | None:
    """The names in "a, b"; None if nothing was asked for."""
    return None if text is None else [name.strip() for name in text.split(",") if name.strip()]


def given_options(context: typer.Context) -> list[str]:
    """The parameters that were typed, and not left at their defaults."""
    return [
        name
        for name in context.params
        if (source := context.get_parameter_source(name)) is not None and source.name != "DEFAULT"
    ]


def refuse_options(given: Collection[str], others: Mapping[str, str], why: str) -> None:
    """Raise ValueError where an option was typed that would be ignored.

    Args:
        others: such options, by the names of their parameters.
        why: what stands before the option in the message.
    """
    for name, option in others.items():
        if name in given:
            raise ValueError(f"{why} {option}; leave it out")


def console() -> Any:
    from rich.console import Console

    # Piped output has no width of its own; tables are then given the room they need.
    width = None if sys.stdout.isatty() else 110
    return Console(markup=False, highlight=False, width=width)
