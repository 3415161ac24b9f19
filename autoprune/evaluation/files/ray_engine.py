"""The questions of a file on the workers of a Ray cluster, one model each (Ray Data)."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator, Sequence
from typing import Any

from .asking import Asker, Asking
from .journal import Entry
from .questions import Forward

# Of this many blocks for each worker, some are left to share out when one is slow or dies.
_BLOCKS = 50
_RAISED = re.compile(r"[\w.]+(Error|Exception|Budget): ")


def answer_with_ray(asking: Asking, pieces: Sequence[list[int]], workers: int) -> Iterator[Entry]:
    """Answer each piece on one of the workers; in no order.

    Ray starts a dead worker again and gives it what it had not handed over. A worker reads questions and
    pictures itself, so it needs the files under the same paths.

    Raises:
        ValueError: fewer than one worker, or a worker failed; the message says why.
        ImportError: Ray is not there.
    """
    if workers < 1:
        raise ValueError(f"workers must be at least 1, got {workers}")
    if not pieces:
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise ImportError("the engine ray needs Ray Data: pip install 'autoprune[ray]'") from error
    started = not ray.is_initialized()
    if started:
        options: dict[str, Any] = {} if os.environ.get("RAY_ADDRESS") else _own_cluster(workers)
        ray.init(log_to_driver=False, logging_level=logging.ERROR, **options)
    try:
        yield from _answers(ray, asking, pieces, workers)
    except ray.exceptions.RayError as error:
        raise ValueError(f"a worker of Ray failed: {_reason(error)}") from error
    finally:
        if started:
            ray.shutdown()


def _reason(error: Exception) -> str:
    """What the worker raised: Ray hands it over as text, the stack trace before it."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    raised = [line for line in lines if _RAISED.match(line)]
    return (raised or lines or [type(error).__name__])[-1].strip()


def _own_cluster(workers: int) -> dict[str, Any]:
    """Of this machine alone. Ray counts one CPU for each worker, and waits for ever for those that are not
    there."""
    return {"include_dashboard": False, "num_cpus": max(os.cpu_count() or 1, workers)}


def _answers(
    ray: Any, asking: Asking, pieces: Sequence[list[int]], workers: int
) -> Iterator[Entry]:
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    on_gpu = asking.device != "cpu" and ray.cluster_resources().get("GPU", 0) > 0
    resources = {"num_gpus": 1} if on_gpu else {"num_cpus": 1}
    blocks = min(len(pieces), _BLOCKS * workers)
    answered = (
        ray.data.from_items([{"piece": piece} for piece in pieces], override_num_blocks=blocks)
        # A task that repartitions them would wait for a CPU, and the workers may hold all.
        .map_batches(
            _Worker,
            fn_constructor_args=(asking,),
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(size=workers),
            **resources,
        )
    )
    for row in answered.iter_rows():
        yield Entry.of_line(row["entry"])


class _Worker:
    """A model in a process of its own."""

    def __init__(self, asking: Asking):
        self._asker, self._questions = Asker(asking), Forward(asking.file)

    def __call__(self, rows: dict[str, Any]) -> dict[str, list[str]]:
        return {"entry": [self._answer(sorted(map(int, piece))) for piece in rows["piece"]]}

    def _answer(self, piece: list[int]) -> str:
        questions = self._questions.take(piece)
        pictures = [self._asker.picture(question) for question in questions]
        return self._asker.answer(questions, pictures).to_line()
