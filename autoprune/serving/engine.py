"""The queue of requests, and the thread that answers them in batches."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import DynamicCache

from ..errors import UnsupportedError
from ..loading import Loaded
from ..policy.budget import InfeasibleBudget
from .conversations import Conversations
from .errors import RequestError
from .generation import Row, generate
from .job import Job
from .pruning import infeasible

log = logging.getLogger(__name__)


@dataclass
class Engine:
    """Answers jobs in batches, one batch after the other.

    A batch takes the job that waits longest and those behind it that can share a batch with it. It waits for
    more of them up to `window` seconds, but only where more are to be expected: others arrive just now, or the
    last batch had company. A client that is alone never waits.

    Args:
        loaded: the model, on its device.
        batch_size: jobs in a batch at most.
        window: seconds.
        on_batch: called with the number of jobs of each batch.
        conversations: caches to go on with; None keeps none.
    """

    loaded: Loaded
    batch_size: int = 8
    window: float = 0.005
    on_batch: Callable[[int], None] = lambda size: None
    conversations: Conversations | None = None
    # Requests that have come and are not in the queue yet.
    arriving: int = 0
    running: int = 0
    # What a batch took lately.
    batch_seconds: float = 1.0
    _waiting: deque[Job] = field(default_factory=deque, repr=False)
    _changed: threading.Condition = field(default_factory=threading.Condition, repr=False)
    _closed: bool = False
    _had_company: bool = False
    _thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin to answer."""
        self._thread = threading.Thread(target=self._work, name="autoprune-engine", daemon=True)
        self._thread.start()

    def close(self, seconds: float | None = None) -> None:
        """Take no more jobs, and wait until those that are there have been answered."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join(seconds)

    @property
    def waiting(self) -> int:
        """How many jobs wait."""
        return len(self._waiting)

    @property
    def replicas(self) -> int:
        """Models in processes of their own: none."""
        return 0

    @property
    def is_alive(self) -> bool:
        """Whether it answers."""
        return self._thread is not None and self._thread.is_alive() and not self._closed

    def arrive(self, count: int) -> None:
        """A request has come (1), or has gone into the queue or away (-1)."""
        with self._changed:
            self.arriving += count
            self._changed.notify_all()

    def submit(self, job: Job) -> None:
        """Put a job into the queue.

        Raises:
            RequestError: the server is about to end.
        """
        with self._changed:
            if self._closed:
                raise RequestError("the server is shutting down", 503, retry_after=5)
            self._waiting.append(job)
            self._changed.notify_all()

    def _work(self) -> None:
        while (jobs := self._next_batch()) is not None:
            self.running, begun = len(jobs), time.monotonic()
            try:
                self.on_batch(len(jobs))
                self._answer(jobs)
            except Exception:  # the thread must outlive whatever happens in a batch
                log.exception("a batch ended with an error of the server's own")
            self.running = 0
            self.batch_seconds += 0.2 * (time.monotonic() - begun - self.batch_seconds)

    def _next_batch(self) -> list[Job] | None:
        """The jobs to answer next; None when the engine was closed and nothing is left."""
        with self._changed:
            while True:
                self._waiting = deque(job for job in self._waiting if not job.cancelled)
                if self._waiting:
                    break
                if self._closed:
                    return None
                self._changed.wait()
            self._wait_for_company()
            return self._taken()

    def _wait_for_company(self) -> None:
        end = time.monotonic() + self.window
        while (
            (self.arriving or self._had_company)
            and len(self._waiting) < self.batch_size
            and not self._closed
            and (left := end - time.monotonic()) > 0
        ):
            self._changed.wait(left)

    def _taken(self) -> list[Job]:
        """Out of the queue: the first job and those that can go with it, in their order."""
        first = self._waiting[0]
        pictures: Any = None
        taken: list[Job] = []
        left: deque[Job] = deque()
        for job in self._waiting:
            fits = len(taken) < self.batch_size and job.kind == first.kind
            own = job.pictures_kind
            if fits and (not own or pictures is None or own == pictures):
                pictures = own or pictures
                taken.append(job)
            else:
                left.append(job)
        self._waiting = left
        self._had_company = len(taken) > 1
        return taken

    def _answer(self, jobs: Sequence[Job]) -> None:
        """Answer a batch; if it fails, what was not begun is answered one by one."""
        now = time.monotonic()
        for job in jobs:
            job.started = job.started or now
        tokenizer = getattr(self.loaded.processor, "tokenizer", self.loaded.processor)
        rows = [Row(job, tokenizer, len(jobs)) for job in jobs]
        try:
            self._generate(rows)
        except Exception as error:
            self._free_memory()
            again = [row for row in rows if len(rows) > 1 and not row.sent]
            for row in rows:
                if row not in again:
                    row.fail(self._told(error))
            for row in again:
                if not row.job.cancelled:
                    self._answer([row.job])

    def _generate(self, rows: Sequence[Row]) -> None:
        """Answer a batch. A job that is alone may go on with a cache, and leaves its own."""
        if self.conversations is None or len(rows) > 1:
            generate(self.loaded, rows)
            return
        job = rows[0].job
        kept = self.conversations.take(job)
        if kept is not None:
            job.cached_tokens = len(kept.ids)
        config = self.loaded.model.config.get_text_config(decoder=True)
        cache = DynamicCache(config=config) if kept is None else kept.cache
        ids, samples = generate(self.loaded, rows, cache, kept)
        if not job.cancelled:
            self.conversations.keep(job, ids[0], cache, samples[0])

    def _told(self, error: Exception) -> RequestError:
        """What a client is told of an error in its batch."""
        if isinstance(error, InfeasibleBudget):
            return infeasible(error)
        if isinstance(error, (ValueError, UnsupportedError)):
            log.warning("a request was refused by the model", exc_info=error)
            return RequestError(
                f"this request cannot be pruned: {str(error).splitlines()[0][:300]}"
            )
        log.error("a request failed", exc_info=error)
        return RequestError("the model failed on this request; the server goes on", 500)

    def _free_memory(self) -> None:
        if self.loaded.model.device.type == "cuda":
            torch.cuda.empty_cache()
