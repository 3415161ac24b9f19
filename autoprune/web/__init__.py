"""The page of `autoprune demo --web`: ask in a browser, and see what was kept."""

from __future__ import annotations

import importlib.util
import os

from rich.console import Console

from ..loading import load_embedded, load_model
from ..policy.budget import Budget


def serve_page(
    model: str | None, method: str, budget: Budget, host: str, port: int, console: Console
) -> None:
    """Serve the page until it is interrupted.

    Args:
        model: folder or hub name of a checkpoint; None is the embedded model.
        method, budget: what is chosen at first.

    Raises:
        ImportError: gradio is missing.
        ValueError: a model that cannot be loaded, or an address that cannot be used.
    """
    if importlib.util.find_spec("gradio") is None:
        raise ImportError("the page needs gradio: pip install 'autoprune[web]'")
    # Set before gradio is imported: it reports nothing to anyone.
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    from .page import launch

    loaded = load_embedded() if model is None else load_model(model)
    share = budget.value * 100 if budget.kind == "ratio" else 11
    console.print(f"http://{host}:{port}  (Ctrl-C ends it)")
    launch(loaded, method, share, host, port)
