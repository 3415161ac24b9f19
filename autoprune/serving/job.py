"""A request on its way through the engine, and what is told of it."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any

from ..methods.base import Method
from ..trace import Sample
from .collate import batch_kind
from .errors import RequestError
from .prompt import Prompt
from .request import Request


@dataclass(frozen=True)
class Piece:
    """A piece of the answer.

    logprobs: of the tokens since the last piece, as OpenAI writes them; empty if nobody asked.
    """

    text: str
    logprobs: list[dict[str, Any]]


@dataclass(frozen=True)
class Finished:
    """The end of an answer.

    reason: "stop" or "length".
    tokens: how many were generated.
    sample: what its prompt cost.
    batch_size: with how many it was answered.
    """

    reason: str
    tokens: int
    sample: Sample
    batch_size: int


Event = Piece | Finished | RequestError


@dataclass(eq=False)
class Job:
    """One request with its prompt.

    Args:
        tell: called with each event, in the engine's thread; it must not wait.
        on_cancel: called when the client leaves, for engines that cannot look at `cancelled`.
        method_name: as the request names it.
        arrived, started, first_token: seconds of the monotonic clock; None until it happens.
        cancelled: the client has left.
        cached_tokens: of the prompt, were in the cache of an earlier answer.

    Attributes:
        seed: of its own draws.
        kind: jobs of one kind have methods that can share a batch.
        pictures_kind: likewise their pictures; () for a prompt without one, which fits all.
    """

    request: Request
    prompt: Prompt
    method_name: str
    method: Method
    max_tokens: int
    tell: Callable[[Event], None]
    arrived: float = field(default_factory=time.monotonic)
    started: float | None = None
    first_token: float | None = None
    cancelled: bool = False
    cached_tokens: int = 0
    on_cancel: Callable[[], object] = lambda: None
    seed: int = field(init=False)
    kind: tuple[Hashable, ...] = field(init=False)
    pictures_kind: Hashable = field(init=False)

    def __post_init__(self) -> None:
        self.kind = _shares_with(self.method_name, self.method)
        self.pictures_kind = batch_kind(self.prompt)
        given = self.request.sampling.seed
        self.seed = random.getrandbits(63) if given is None else given

    def cancel(self) -> None:
        """The client has left: the job leaves the queue, or its row of the batch ends with the next token."""
        self.cancelled = True
        self.on_cancel()


def _shares_with(method_name: str, method: Method) -> tuple[Hashable, ...]:
    tower = method.tower()
    # Patches are merged in the tower only if all prompts of a batch are of one method.
    merging = method_name if tower.merge else None
    return (method.positions, method.summary, tower.middle, merging)
