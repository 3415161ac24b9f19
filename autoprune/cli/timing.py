"""`autoprune bench`: a model of this process, or a server."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .options import Device, Dtype, Json, Settings, console


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
            help="One or more, by commas; default: 192,128,64; of a checkpoint 1/3,2/9,1/9; of a "
            "server 1/9,2/9,4/9, mixed.",
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
    device: Device = "auto",
    dtype: Dtype = "auto",
    attention: Annotated[str, typer.Option(help="Attention backend of transformers.")] = "sdpa",
    threads: Annotated[
        int, typer.Option(min=1, help="CPU threads; with 1, other programs disturb least.")
    ] = 1,
    repeats: Annotated[
        int | None, typer.Option(min=1, help="Rounds; default: 10, of a server 3.")
    ] = None,
    new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Decoding steps; default: 32.")
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="AutoPrune alone, 3 rounds of 4 steps.")
    ] = False,
    serve: Annotated[
        str | None,
        typer.Option(metavar="URL", help="Load a running `autoprune serve` instead of a model."),
    ] = None,
    clients: Annotated[
        int | None, typer.Option(min=1, help="With --serve: at a time; default: 8.")
    ] = None,
    requests: Annotated[
        int | None,
        typer.Option(min=1, help="With --serve: of each kind in a round; default: 32."),
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option(min=1, help="With --serve: longest answer; default: 32.")
    ] = None,
    api_key: Annotated[
        str | None,
        typer.Option(envvar="AUTOPRUNE_API_KEY", help="With --serve: what the server wants."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="Folder, or JSON file, for the figures and a plot.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Measure what pruning saves in time and memory, beside what its FLOPs promise."""
    from ..commands import bench as command

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
    loads = {"clients": clients, "requests": requests, "max_tokens": max_tokens}
    if serve is None:
        given = [
            f"--{name.replace('_', '-')}" for name, value in loads.items() if value is not None
        ]
        if given:
            raise ValueError(f"{', '.join(given)}: only with --serve URL")
        command.bench(request, console())
        return
    from ..commands import bench_serve as server

    server.bench_serve(server.load_of(serve, request, loads, api_key), console())
