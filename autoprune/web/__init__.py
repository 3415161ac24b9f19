"""The page of `autoprune demo --web`: ask in a browser, and see what was kept."""

from __future__ import annotations

import importlib.util
import os
import socket

from rich.console import Console

from ..loading import load_embedded, load_model
from ..policy.budget import Budget

SHARE = 11
"""Percent of the visual tokens that the page keeps at first."""


def serve_page(
    model: str | None, method: str, budget: Budget | None, host: str, port: int, console: Console
) -> None:
    """Serve the page until it is interrupted.

    Args:
        model: folder or hub name of a checkpoint; None is the embedded model.
        method, budget: what is chosen at first; None is `SHARE`.

    Raises:
        ImportError: gradio is missing.
        ValueError: no such method, a budget that is no share, a model that cannot be loaded, or an address
            that cannot be used.
    """
    if budget is not None and budget.kind != "ratio":
        raise ValueError(
            "the page takes a share of the visual tokens, as pictures differ in how many they have; got "
            f"{budget}; give one such as --budget 11%"
        )
    share = SHARE if budget is None else budget.value * 100
    if importlib.util.find_spec("gradio") is None:
        raise ImportError("the page needs gradio: pip install 'autoprune[web]'")
    # Set before gradio is imported: it reports nothing to anyone.
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    from .asking import build
    from .page import launch

    build(method, share)
    _check_address(host, port)
    loaded = load_embedded() if model is None else load_model(model)
    page = launch(loaded, method, share, host, port)
    console.print(f"http://{host}:{port}  (Ctrl-C ends it)")
    page.block_thread()


def _check_address(host: str, port: int) -> None:
    """Raise ValueError where nothing can be served, before a model is loaded."""
    try:
        family, *_, address = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, socket.SOCK_STREAM) as tried:
            tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            tried.bind(address)
    except OSError as error:
        raise ValueError(
            f"nothing can be served at {host}:{port}: {error}; give another --port or --host"
        ) from error
