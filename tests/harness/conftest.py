"""The harness in this process, with local tasks only; skipped where it is not installed."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

if importlib.util.find_spec("lmms_eval") is None:
    collect_ignore_glob = ["test_*.py"]

BUDGET = 16
PER_KIND = 2

Evaluate = Callable[..., dict[str, Any]]


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the tasks autoprune_shapes and pope_of_shapes."""
    from autoprune.evaluation.shapes import export_shapes

    from .pope import write_pope

    folder = tmp_path_factory.mktemp("tasks")
    export_shapes(folder, PER_KIND)
    write_pope(folder)
    return folder


@pytest.fixture(scope="session")
def evaluate(data: Path) -> Evaluate:
    """`evaluate("autoprune_shapes", "method=autoprune,budget=16", batch_size=4)`, with samples."""
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.tasks import TaskManager

    tasks = TaskManager("ERROR", include_path=str(data), include_defaults=False)

    def run(task: str, arguments: str, batch_size: int = 4, **options: Any) -> dict[str, Any]:
        return simple_evaluate(
            model="autoprune",
            model_args=arguments,
            tasks=[task],
            batch_size=batch_size,
            task_manager=tasks,
            bootstrap_iters=0,
            **options,
        )

    return run
