"""`autoprune score`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .options import Json, console


def score(
    format: Annotated[
        str,
        typer.Argument(
            metavar="FORMAT",
            help="textvqa, vqav2, vizwiz, gqa, pope, mme, scienceqa or coco-caption.",
        ),
    ],
    answers_file: Annotated[
        Path, typer.Option(help="JSON lines with question_id, prompt and text, as LLaVA's.")
    ],
    annotations: Annotated[Path, typer.Option(help="The data set's own file or folder.")],
    question_file: Annotated[
        Path | None, typer.Option(help="LLaVA's questions; for pope's folder, and for vizwiz.")
    ] = None,
    split: Annotated[str, typer.Option(help="Of scienceqa.")] = "test",
    against: Annotated[
        Path | None,
        typer.Option(help="Other answers, such as the unpruned model's: how often both agree."),
    ] = None,
    answered_only: Annotated[
        bool,
        typer.Option("--answered-only", help="Leave out questions that have no answer."),
    ] = False,
    as_json: Json = False,
) -> None:
    """Score a file of answers by the data set's own formula."""
    from ..commands import score as command

    request = command.ScoreRequest(
        format=format,
        answers_file=answers_file,
        annotations=annotations,
        question_file=question_file,
        split=split,
        against=against,
        answered_only=answered_only,
        as_json=as_json,
    )
    command.score(request, console())
