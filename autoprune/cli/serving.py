"""`autoprune serve`: answers over HTTP."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .options import Device, Dtype, MethodOrFile, Model, Settings, by_commas


def serve(
    model: Model = None,
    method: MethodOrFile = "autoprune",
    budget: Annotated[
        str | None,
        typer.Option(
            help="Of requests that state none: mean visual tokens per layer (64), or a share of "
            "them (1/9, 11%)."
        ),
    ] = None,
    settings: Settings = None,
    allow_methods: Annotated[
        str | None, typer.Option(help="Further methods for requests, by commas; or all.")
    ] = None,
    host: Annotated[str, typer.Option(help="Address; 0.0.0.0 is every one of this machine.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000,
    api_key: Annotated[
        str | None,
        typer.Option(
            envvar="AUTOPRUNE_API_KEY", help="What clients must show; better in AUTOPRUNE_API_KEY."
        ),
    ] = None,
    served_name: Annotated[
        str | None, typer.Option(help="Name of the model for clients; default: its folder's.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Requests answered together.")] = 8,
    window: Annotated[
        float, typer.Option(help="Milliseconds to wait for others to share a batch.")
    ] = 5.0,
    queue: Annotated[
        int, typer.Option(min=1, help="Requests in the server at a time; more get 429.")
    ] = 64,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer to be asked for.")] = 1024,
    default_tokens: Annotated[
        int, typer.Option(min=1, help="Longest answer where a request says nothing.")
    ] = 256,
    max_pictures: Annotated[int, typer.Option(min=1, help="In one request.")] = 4,
    max_pixels: Annotated[
        int, typer.Option(min=1, help="Of one picture, width times height.")
    ] = 25_000_000,
    max_body: Annotated[int, typer.Option(min=1, help="Megabytes of a request.")] = 16,
    timeout: Annotated[int, typer.Option(min=1, help="Seconds for an answer.")] = 300,
    grace: Annotated[
        int, typer.Option(min=0, help="Seconds to finish answers when the server is told to end.")
    ] = 30,
    allow_folder: Annotated[
        Path | None, typer.Option(help="Folder whose pictures requests may name as file:NAME.")
    ] = None,
    allow_urls: Annotated[
        str | None, typer.Option(help="Hosts whose pictures may be fetched, by commas.")
    ] = None,
    conversations: Annotated[
        int, typer.Option(min=0, help="Caches that are kept for further questions.")
    ] = 0,
    engine: Annotated[
        str, typer.Option(help="local: one model, in this process; ray: replicas on Ray Serve.")
    ] = "local",
    replicas: Annotated[
        int | None,
        typer.Option(min=1, help="Models of --engine ray, each in a process; default: 1."),
    ] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:
    """Serve a model as OpenAI's API does, with a pruning budget for each request."""
    from ..commands import serve as command

    command.check_installed()
    allowed = by_commas(allow_methods) or []
    command.serve(
        command.ServeRequest(
            command.methods_of(method, budget, settings or [], allowed),
            "all" in allowed,
            model,
            device,
            dtype,
            host,
            port,
            grace,
            options={
                "name": served_name,
                "api_key": api_key,
                "default_tokens": default_tokens,
                "window": window / 1000,
                "folder": allow_folder,
                "conversations": conversations,
                "hosts": tuple(by_commas(allow_urls) or ()),
            },
            limits={
                "body_bytes": max_body * 2**20,
                "picture_bytes": max_body * 2**20 // 2,
                "picture_pixels": max_pixels,
                "pictures": max_pictures,
                "max_tokens": max_tokens,
                "queue": queue,
                "batch_size": batch_size,
                "seconds": timeout,
            },
            engine=engine,
            replicas=replicas,
        )
    )
