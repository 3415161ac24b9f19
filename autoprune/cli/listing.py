"""`autoprune methods` and `families`."""

from __future__ import annotations

from typing import Annotated

import typer

from .options import Json, console


def methods(
    name: Annotated[str | None, typer.Argument(help="Explain this one.")] = None,
    as_json: Json = False,
) -> None:
    """List the pruning methods, or explain one and its options."""
    from ..commands import methods as command

    if name is None:
        command.methods(console(), as_json)
    else:
        command.explain(name, console(), as_json)


def families(
    as_json: Json = False,
    as_markdown: Annotated[
        bool, typer.Option("--markdown", help="Print the table of the README.")
    ] = False,
) -> None:
    """List the families of models that are supported, and what is checked of each."""
    from ..commands import families as command

    command.families(console(), as_json, as_markdown)
