"""All parts of a server together: from the bytes of a request to a job in the queue."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ..loading import Loaded
from ..methods.base import Method
from .conversations import Conversations, check_model
from .engine import Engine
from .errors import RequestError
from .fetch import Fetcher
from .fields import parse_json, shown
from .job import Event, Job
from .limits import Limits
from .metrics import Metrics
from .pictures import Pictures
from .prompt import Prompts
from .pruning import Allowed
from .replicas import Replicas
from .request import Request, parse_request

# Decoded pictures are large: a few at a time, however many requests there are.
_PREPARED_AT_ONCE = 2


@dataclass(frozen=True)
class Options:
    """What a server is started with.

    Attributes:
        name: under which the model is served; None is the checkpoint's own name.
        api_key: what clients must show; None lets everybody in.
        default_tokens: of an answer, where a request says nothing.
        window: seconds to wait for further requests of a batch.
        folder: whose pictures requests may name; None allows none.
        hosts: whose pictures may be fetched.
        conversations: caches of answers that are kept, to go on with.
        limits: how large a request may be.
    """

    name: str | None = None
    api_key: str | None = None
    default_tokens: int = 256
    window: float = 0.005
    folder: Path | None = None
    hosts: tuple[str, ...] = ()
    conversations: int = 0
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        if self.api_key is not None and not self.api_key.strip():
            raise ValueError("the API key is empty; give one, or none at all")
        if self.folder is not None and not self.folder.is_dir():
            raise ValueError(f"there is no folder {str(self.folder)!r} of pictures")
        if not 0 <= self.window <= 10:
            raise ValueError(f"the window must be 0 to 10 seconds, got {self.window!r}")


class Service:
    """Takes requests for one model.

    Args:
        loaded: the model; without weights if `replicas` have them.
        methods: those that requests may choose from, the first one by default, each with the server's budget.
        replicas: answer in place of an engine in this process; they keep no caches of conversations.

    Raises:
        ValueError, UnsupportedError: a method cannot prune this model.
    """

    def __init__(
        self,
        loaded: Loaded,
        methods: Mapping[str, Method],
        options: Options = Options(),
        replicas: Replicas | None = None,
    ) -> None:
        attachments = [method(loaded.model) for method in methods.values()]
        self.options, self.limits = options, options.limits
        self.name = options.name or loaded.name.replace(" ", "-")
        self.allowed = Allowed(methods, attachments[0].shape)
        self.prompts = Prompts(loaded, attachments[0].located.visual_ids)
        fetcher = Fetcher(options.hosts, self.limits.picture_bytes) if options.hosts else None
        self.pictures = Pictures(self.limits, options.folder, fetcher)
        self.engine: Engine | Replicas
        if replicas is not None:
            self.engine = replicas
        else:
            visual_ids = torch.tensor(attachments[0].located.visual_ids)
            self.engine = self._own_engine(loaded, visual_ids)
        self.metrics = Metrics(
            lambda: self.engine.waiting, lambda: self.engine.running, lambda: self.engine.replicas
        )
        self.pool = ThreadPoolExecutor(_PREPARED_AT_ONCE, thread_name_prefix="autoprune-prepare")
        self.present = 0

    def _own_engine(self, loaded: Loaded, visual_ids: torch.Tensor) -> Engine:
        engine = Engine(
            loaded,
            self.limits.batch_size,
            self.options.window,
            lambda n: self.metrics.batches.observe(n),
        )
        if self.options.conversations:
            check_model(loaded.model)
            engine.conversations = Conversations(self.options.conversations, visual_ids)
        return engine

    def start(self) -> None:
        """Begin to answer."""
        self.engine.start()

    def close(self, seconds: float | None = None) -> None:
        """Answer what is there, at most so many seconds, and end."""
        self.pool.shutdown(wait=False, cancel_futures=True)
        self.engine.close(seconds)

    @property
    def is_full(self) -> bool:
        """Whether no further request is taken."""
        return self.present >= self.limits.queue

    def full(self) -> RequestError:
        """What a request is told that finds the server full."""
        return RequestError(
            f"{self.present} requests are waiting already; try again later",
            status=429,
            code="queue_full",
            retry_after=self._seconds_to_wait(),
        )

    def _seconds_to_wait(self) -> int:
        """How long the queue takes, by what a batch took lately."""
        batches = self.present / self.limits.batch_size
        return max(1, math.ceil(batches * self.engine.batch_seconds))

    def job(self, body: bytes, tell: Callable[[Event], None]) -> Job:
        """The job of a request. Takes a while: pictures are decoded.

        Raises:
            RequestError: it is refused.
        """
        request = parse_request(parse_json(body), self.limits)
        self._check_model(request)
        method_name, method = self.allowed.choose(request.pruning)
        max_tokens = request.max_tokens or min(self.options.default_tokens, self.limits.max_tokens)
        pictures = [self.pictures.load(part) for part in request.pictures]
        prompt = self.prompts.make(request.messages, pictures, max_tokens)
        self.allowed.check(method_name, method, prompt)
        return Job(request, prompt, method_name, method, max_tokens, tell)

    def _check_model(self, request: Request) -> None:
        if request.model not in (None, self.name):
            raise RequestError(
                f"this server has no model {shown(request.model)}; it has {self.name!r}",
                status=404,
                param="model",
                code="model_not_found",
            )


class Visit:
    """A request that is in the server, from its first byte to the last of its answer."""

    def __init__(self, service: Service) -> None:
        self._service, self._arriving, self._inside = service, True, True
        service.present += 1
        service.engine.arrive(1)

    def queued(self) -> None:
        """It is in the queue now, or has been refused."""
        if self._arriving:
            self._arriving = False
            self._service.engine.arrive(-1)

    def leave(self) -> None:
        """It is over; harmless when said twice."""
        self.queued()
        if self._inside:
            self._inside = False
            self._service.present -= 1
