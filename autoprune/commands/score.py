"""`autoprune score`: a file of answers, scored as the data set's own evaluation does."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from ..evaluation.scorers import Figure, Scored, Sources
from ..evaluation.scorers import score as score_answers
from .report import print_json

_SHOWN = 5


@dataclass(frozen=True)
class ScoreRequest:
    """What to score, and by which data set."""

    format: str
    answers_file: Path
    annotations: Path
    question_file: Path | None = None
    split: str = "test"
    against: Path | None = None
    answered_only: bool = False
    as_json: bool = False


def score(request: ScoreRequest, console: Console) -> None:
    """Print the score; exit code 1 where a question has no answer.

    Raises:
        ValueError, ImportError: see `evaluation.scorers.score`.
    """
    sources = Sources(request.annotations, request.question_file, request.split)
    found = score_answers(
        request.format, request.answers_file, sources, request.against, request.answered_only
    )
    if request.as_json:
        files = {"answers": str(request.answers_file), "annotations": str(request.annotations)}
        print_json(console, {"format": request.format, **files, **found.to_dict()})
    else:
        _show(found, console)
    warnings = Console(stderr=True, markup=False, highlight=False, soft_wrap=True)
    for line in _warnings(found):
        warnings.print(f"autoprune: {line}")
    if found.missing:
        raise SystemExit(1)


def _show(found: Scored, console: Console) -> None:
    table = Table(show_edge=False, pad_edge=False)
    table.add_column("figure")
    for heading in ("value", "95 % interval", "questions"):
        table.add_column(heading, justify="right", no_wrap=True)
    for figure in [*found.figures, *([found.agreement] if found.agreement else [])]:
        value = "-" if figure.value is None else _written(figure, figure.value)
        interval = ""
        if figure.low is not None and figure.high is not None:
            interval = f"{_written(figure, figure.low)} to {_written(figure, figure.high)}"
        table.add_row(figure.name, value, interval, str(figure.questions))
    console.print(table)
    for note in found.notes:
        console.print(note)


def _written(figure: Figure, value: float) -> str:
    if figure.unit == "%":
        return f"{value:.2f} %"
    return f"{value:.2f}" if figure.unit else f"{value:.4f}"


def _warnings(found: Scored) -> Iterator[str]:
    if found.missing:
        yield (
            f"{len(found.missing)} of {found.questions} questions have no answer and count as wrong: "
            f"{_listed(found.missing)}"
        )
    if found.left_out:
        yield f"{found.left_out} questions without an answer are left out"
    if found.unknown:
        yield (
            f"{len(found.unknown)} answers belong to no question of the annotations and do not count: "
            f"{_listed(found.unknown)}"
        )
    if found.empty:
        yield f"{found.empty} answers are empty"


def _listed(names: Sequence[str]) -> str:
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {more} more (--json lists all)" if more > 0 else "")
