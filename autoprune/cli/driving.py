"""`autoprune drive`: a plan from the six cameras of a car."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .options import Compare, Device, Dtype, Json, MaxNewTokens, MethodOrFile, Settings, console


def drive(
    frames: Annotated[
        list[str],
        typer.Argument(
            help="A folder with a picture of each camera (CAM_FRONT ... in its name), or six pictures."
        ),
    ],
    speed: Annotated[float, typer.Option(help="Speed of the car in m/s.")],
    command: Annotated[
        str, typer.Option(help="Where to go: go straight, turn left or turn right.")
    ] = "go straight",
    model: Annotated[str | None, typer.Option(help="Folder of a converted Senna.")] = None,
    budget: Annotated[
        str | None,
        typer.Option(help="Mean visual tokens per layer, or a share of them (1/9, 11%)."),
    ] = None,
    method: MethodOrFile = "autoprune",
    settings: Settings = None,
    max_new_tokens: MaxNewTokens = 64,
    compare: Compare = False,
    picture: Annotated[
        Path | None, typer.Option(help="Write the views with their kept tokens to this PNG.")
    ] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    as_json: Json = False,
) -> None:
    """Plan what a car does next, by Senna, with pruned visual tokens of its six views."""
    from ..commands import drive as work
    from ..commands.inputs import build_method, parse_budget
    from ..models.senna.planning import planning_question

    question = planning_question(speed, command)
    found = work.find_frames(frames)
    asked = None if budget is None else parse_budget(budget)
    built = build_method(method, asked, {}, settings or [])
    request = work.DriveRequest(
        found[0],
        question,
        built,
        model,
        device,
        dtype,
        max_new_tokens,
        compare,
        as_json,
        picture,
        found,
    )
    work.drive(request, console())
