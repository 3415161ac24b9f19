"""The command line: one function for each command, in the modules of this package.

What is imported here is cheap; each command imports what it needs when it runs.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from . import answering, driving, files, listing, measuring, serving, timing

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Prune the visual tokens of vision-language models under an exact compute budget.",
)


def _show_version(asked: bool) -> None:
    if asked:
        from .. import __version__

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


app.command()(answering.demo)
app.command(cls=answering.AsksQuestions)(answering.run)
app.command(cls=answering.AsksQuestions)(answering.explain)
app.command()(answering.plan)
app.command()(driving.drive)
app.command()(files.score)
app.command()(files.answer)
app.command(hidden=True)(files.llava_eval)
app.command()(listing.methods)
app.command()(listing.families)
app.command()(timing.bench)
app.command()(measuring.compare)
app.command("eval")(measuring.evaluate)
app.command()(measuring.tune)
app.command()(serving.serve)


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
    from ..commands.report import as_options
    from ..errors import UnsupportedError

    message = " ".join(str(error).split())
    if isinstance(error, (ValueError, ImportError, OSError, UnsupportedError)) and message:
        return as_options(message)
    return f"unexpected {type(error).__name__}: {message} (add --debug to see where it arose)"


def _quiet_libraries() -> None:
    """Keep the advice of other libraries out of the way of results."""
    import logging
    import os
    import warnings

    from ..quiet_imports import NOISY_IMPORTS

    for name in NOISY_IMPORTS:
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    warnings.filterwarnings("default", category=UserWarning, module=r"autoprune\.commands")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
