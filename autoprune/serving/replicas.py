"""The engine in several processes at once, on Ray Serve: each has the model, and batches of its own.

Everything but the model stays in the server's process: HTTP, limits, keys, pictures, prompts, metrics. A job
goes to one of the replicas, and its events come back.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
import time
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from ..loading import load_embedded, load_model
from ..methods.base import Method
from .engine import Engine
from .errors import RequestError
from .job import Event, Finished, Job, Piece
from .logs import set_up
from .prompt import Prompt
from .request import Request

log = logging.getLogger(__name__)

_RAISED = re.compile(r"[\w.]+(Error|Exception|Budget): ")
_HEALTH_SECONDS = 2.0
"""How often Ray Serve looks for dead replicas."""


@dataclass(frozen=True)
class Told:
    """An event on its way back.

    queue_seconds, first_seconds: from the job's arrival at the replica to the model, and to the first token.
        None until then. Each process has a clock of its own, so these are spans.
    """

    event: Event
    queue_seconds: float | None
    first_seconds: float | None


class Replica:
    """An engine in a process of its own; arguments as for `load_model` and `Engine`."""

    def __init__(
        self, model: str | None, device: str, dtype: str, batch_size: int, window: float
    ) -> None:
        set_up("WARNING")
        where = (device, dtype)
        loaded = load_embedded(*where) if model is None else load_model(model, *where)
        self._engine = Engine(loaded, batch_size, window)
        self._engine.start()

    async def answer(
        self, request: Request, prompt: Prompt, name: str, method: Method, max_tokens: int
    ) -> AsyncIterator[Told]:
        """The events of a job; arguments as for `Job`."""
        loop = asyncio.get_running_loop()
        events: asyncio.Queue[Event] = asyncio.Queue()

        def tell(event: Event) -> None:
            loop.call_soon_threadsafe(events.put_nowait, event)

        job = Job(request, prompt, name, method, max_tokens, tell)
        try:
            self._engine.submit(job)
            event: Event = Piece("", [])
            while isinstance(event, Piece):
                event = await events.get()
                yield Told(event, _since(job, job.started), _since(job, job.first_token))
        finally:
            # If the client has left, this ends its row.
            job.cancel()

    def check_health(self) -> None:
        """Called by Ray Serve, which starts a new replica where this raises."""
        if not self._engine.is_alive:
            raise RuntimeError("the engine has ended")


class Replicas:
    """Takes jobs as `Engine` does; replicas on Ray answer them. Made by `on_ray`.

    A job whose replica dies is told 503, to be asked again. Ray Serve replaces the replica, and the others go
    on meanwhile.

    Attributes:
        replicas: how many.
        device: of all of them, "cuda" or "cpu".
    """

    def __init__(self, replicas: int, device: str, cpus: int) -> None:
        self.replicas, self.device, self._cpus = replicas, device, cpus
        self.batch_seconds = 1.0
        self._handle: Any = None
        self._closed = False
        self._inside: dict[Job, asyncio.Task[None]] = {}
        self._name = f"autoprune-{uuid.uuid4().hex[:12]}"

    def load(self, model: str | None, dtype: str, batch_size: int, window: float) -> None:
        """Start the replicas; returns when all of them have the model.

        Raises:
            ValueError: they could not be started; the message says why.
        """
        from ray import serve

        on_gpu = self.device == "cuda"
        resources = {"num_cpus": self._cpus, "num_gpus": 1 if on_gpu else 0}
        quiet = {"log_level": "WARNING", "enable_access_log": False}
        deployed = serve.deployment(Replica).options(
            num_replicas=self.replicas,
            # One batch runs, one waits; what comes on top goes to whoever is free first.
            max_ongoing_requests=2 * batch_size,
            ray_actor_options=resources,
            health_check_period_s=_HEALTH_SECONDS,
            graceful_shutdown_timeout_s=1.0,
            max_constructor_retry_count=1,
            logging_config=quiet,
        )
        app = deployed.bind(model, self.device, dtype, batch_size, window)
        try:
            serve.start(proxy_location="Disabled", logging_config=quiet)
            handle = serve.run(app, name=self._name, route_prefix=None)
        except RuntimeError as error:
            known = serve.status().applications.get(self._name)
            told = [each.message for each in known.deployments.values()] if known else []
            raise ValueError(f"a replica could not be started: {_reason(error, told)}") from error
        self._handle = handle.options(method_name="answer", stream=True)

    def unload(self) -> None:
        """End the replicas."""
        from ray import serve

        if self._handle is not None:
            serve.delete(self._name)

    def start(self) -> None:
        """Nothing: `load` has started it."""

    def close(self, seconds: float | None = None) -> None:
        """Take no more jobs; those that are there are given up."""
        self._closed = True

    def arrive(self, count: int) -> None:
        """Nothing: replicas know only of jobs that have reached them."""

    @property
    def is_alive(self) -> bool:
        """Whether it answers."""
        return self._handle is not None and not self._closed

    @property
    def running(self) -> int:
        """Jobs whose answers have begun."""
        return sum(job.started is not None for job in list(self._inside))

    @property
    def waiting(self) -> int:
        """The other ones."""
        return len(self._inside) - self.running

    def submit(self, job: Job) -> None:
        """Send a job to a replica; called in the event loop.

        Raises:
            RequestError: the server is about to end.
        """
        if not self.is_alive:
            raise RequestError("the server is shutting down", 503, retry_after=5)
        task = asyncio.get_running_loop().create_task(self._carry(job, self._handle))
        self._inside[job] = task
        task.add_done_callback(lambda done: self._inside.pop(job, None))
        job.on_cancel = task.cancel

    async def _carry(self, job: Job, handle: Any) -> None:
        """Send the job, and hand its events back."""
        # The words and pictures of its messages are in the prompt already.
        request = replace(job.request, messages=())
        sent = time.monotonic()
        stream = handle.remote(request, job.prompt, job.method_name, job.method, job.max_tokens)
        try:
            async for told in stream:
                if told.queue_seconds is not None:
                    job.started = job.started or sent + told.queue_seconds
                if told.first_seconds is not None:
                    job.first_token = job.first_token or sent + told.first_seconds
                if isinstance(told.event, Finished):
                    self._note(time.monotonic() - (job.started or sent))
                job.tell(told.event)
        except asyncio.CancelledError:
            stream.cancel()
            raise
        except Exception as error:  # Ray has many kinds
            job.tell(_broken(error))

    def _note(self, seconds: float) -> None:
        """Remember how long an answer took."""
        self.batch_seconds += 0.2 * (seconds / self.replicas - self.batch_seconds)


@contextmanager
def on_ray(replicas: int, device: str) -> Iterator[Replicas]:
    """Room for replicas, for as long as the block: the cluster of RAY_ADDRESS, or one of this machine alone.

    Args:
        device: "auto" takes GPUs if the cluster has some, one for each replica.

    Raises:
        ImportError: Ray Serve is not there.
        ValueError: Ray could not be started, or there are fewer GPUs than replicas.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    os.environ.setdefault("RAY_SERVE_LOG_TO_STDERR", "0")
    try:
        import ray
        from ray import serve  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "--engine ray needs Ray Serve: pip install 'autoprune[ray,serve]'"
        ) from error
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    cores, own = os.cpu_count() or 1, not os.environ.get("RAY_ADDRESS")
    # Ray counts CPUs by what it is told, and would wait for ever for those that are not there.
    counted = max(cores, replicas)
    started = {"address": "local", "include_dashboard": False, "num_cpus": counted}
    options: dict[str, Any] = started if own else {}
    try:
        ray.init(log_to_driver=False, logging_level=logging.ERROR, **options)
    except Exception as error:  # Ray raises many kinds
        ray.shutdown()
        raise ValueError(f"Ray could not be started, or reached: {error}") from error
    made = None
    try:
        gpus = int(ray.cluster_resources().get("GPU", 0))
        on_gpu = device == "cuda" or (device == "auto" and gpus > 0)
        if on_gpu and gpus < replicas:
            raise ValueError(
                f"{replicas} replicas need a GPU each, and Ray finds {gpus}; "
                "give fewer --replicas, or --device cpu"
            )
        cpus = counted // replicas if own else 1
        made = Replicas(replicas, "cuda" if on_gpu else "cpu", cpus)
        yield made
    finally:
        if made is not None and not own:
            made.unload()
        ray.shutdown()


def _since(job: Job, moment: float | None) -> float | None:
    return None if moment is None else moment - job.arrived


def _broken(error: Exception) -> RequestError:
    """What a client is told when its replica gave no answer."""
    from ray.exceptions import RayError, RayTaskError
    from ray.serve.exceptions import RayServeException

    if isinstance(error, (RayError, RayServeException)) and not isinstance(error, RayTaskError):
        log.warning("a replica has ended, and with it a request: %s", type(error).__name__)
        return RequestError(
            "the replica that had this request has ended; ask again", 503, retry_after=1
        )
    log.error("a request failed in its replica", exc_info=error)
    return RequestError("the model failed on this request; the server goes on", 500)


def _reason(error: Exception, messages: list[str]) -> str:
    """What a replica raised: Ray hands it over as text, with the stack trace before it."""
    lines = [line.strip() for text in (*messages, str(error)) for line in text.splitlines()]
    raised = [line for line in lines if _RAISED.match(line)]
    return (raised or [line for line in lines if line] or [type(error).__name__])[-1]
