"""The JSON of `/v1/chat/completions` as a `Request`: read and checked, before anything runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..policy.budget import Budget
from .errors import RequestError
from .fields import LEAVE_OUT, Fields, shown, whole_text
from .limits import Limits
from .messages import Message, Part, parse_messages

MOST_TEMPERATURE = 2.0
MOST_LOGPROBS = 20
MOST_STOPS = 4
MOST_BUDGET = 1e18
SEEDS = (-(2**63), 2**63 - 1)

KNOWN = (
    "model, messages, stream, stream_options, max_tokens, max_completion_tokens, temperature, top_p, seed, "
    "stop, logprobs, top_logprobs, n, user and autoprune"
)
UNSUPPORTED = {
    "tools": LEAVE_OUT,
    "tool_choice": LEAVE_OUT,
    "parallel_tool_calls": LEAVE_OUT,
    "functions": LEAVE_OUT,
    "function_call": LEAVE_OUT,
    "response_format": "answers are plain text; leave it out",
    "logit_bias": LEAVE_OUT,
    "presence_penalty": LEAVE_OUT,
    "frequency_penalty": LEAVE_OUT,
    "modalities": "answers are text; leave it out",
    "audio": "answers are text; leave it out",
    "prediction": LEAVE_OUT,
    "reasoning_effort": LEAVE_OUT,
    "store": "nothing is stored; leave it out",
    "metadata": "nothing is stored; leave it out",
    "service_tier": LEAVE_OUT,
    "web_search_options": LEAVE_OUT,
    "top_k": "use temperature and top_p",
    "min_p": "use temperature and top_p",
    "best_of": "send several requests",
    "echo": LEAVE_OUT,
    "suffix": LEAVE_OUT,
    "autoprune_budget": 'write "autoprune": {"budget": 36}',
}

# Values of theirs that ask for nothing, which some clients always send.
ASKS_NOTHING = {
    "tools": [],
    "response_format": {"type": "text"},
    "logit_bias": {},
    "presence_penalty": 0,
    "frequency_penalty": 0,
    "store": False,
}


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen; temperature 0 takes the likeliest."""

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None


@dataclass(frozen=True)
class Pruning:
    """What the request says of pruning; None is what the server does by default.

    budget: number of tokens, or a `Budget` of another kind.
    """

    budget: float | Budget | None = None
    method: str | None = None
    details: bool = False


@dataclass(frozen=True)
class Request:
    """One request, whose numbers and words can be right."""

    messages: tuple[Message, ...]
    model: str | None = None
    stream: bool = False
    usage_in_stream: bool = False
    max_tokens: int | None = None
    sampling: Sampling = Sampling()
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    pruning: Pruning = Pruning()

    @property
    def pictures(self) -> list[Part]:
        """The pictures, in the order in which they stand."""
        return [p for message in self.messages for p in message.parts if p.picture is not None]


def parse_request(value: Any, limits: Limits) -> Request:
    """The request in a JSON value.

    Raises:
        RequestError: a field is missing, unknown, or cannot be right.
    """
    fields = Fields(value)
    messages = parse_messages(fields, limits)
    stream = fields.boolean("stream", False)
    fields.integer("n", 1, 1, 1)
    fields.text("user", None)
    for name, nothing in ASKS_NOTHING.items():
        fields.drop(name, nothing)
    request = Request(
        messages=messages,
        model=fields.text("model", None),
        stream=stream,
        usage_in_stream=_usage_in_stream(fields, stream),
        max_tokens=_max_tokens(fields, limits),
        sampling=Sampling(
            fields.number("temperature", 0, MOST_TEMPERATURE, 0.0),
            _top_p(fields),
            fields.integer("seed", *SEEDS, None),
        ),
        stop=_stop(fields),
        logprobs=_logprobs(fields),
        pruning=_pruning(fields),
    )
    fields.finish(UNSUPPORTED, KNOWN)
    return request


def _usage_in_stream(fields: Fields, stream: bool) -> bool:
    options = fields.take("stream_options", None)
    if options is None:
        return False
    inner = Fields(options, "stream_options")
    wanted = inner.boolean("include_usage", False)
    inner.finish({"include_obfuscation": LEAVE_OUT}, "include_usage")
    if not stream:
        raise RequestError(
            "stream_options is for streamed answers; set stream to true", param="stream_options"
        )
    return bool(wanted)


def _max_tokens(fields: Fields, limits: Limits) -> int | None:
    given = [
        fields.integer(name, 1, limits.max_tokens, None)
        for name in ("max_completion_tokens", "max_tokens")
    ]
    if None not in given and given[0] != given[1]:
        raise RequestError(
            f"max_completion_tokens is {given[0]} and max_tokens is {given[1]}; give one of them",
            param="max_tokens",
        )
    return given[1] if given[0] is None else given[0]


def _top_p(fields: Fields) -> float:
    top_p = fields.number("top_p", 0, 1, 1.0)
    if top_p == 0:
        raise fields.wrong("top_p", "above 0; temperature 0 takes the likeliest token", top_p)
    return float(top_p)


def _stop(fields: Fields) -> tuple[str, ...]:
    stop = fields.take("stop", [])
    stops = [stop] if isinstance(stop, str) else stop
    if not isinstance(stops, list) or len(stops) > MOST_STOPS:
        raise fields.wrong("stop", f"a string, or a list of up to {MOST_STOPS}", stop)
    for text in stops:
        if not isinstance(text, str) or not 0 < len(text) <= 200:
            raise fields.wrong("stop", "strings of 1 to 200 characters", text)
        whole_text(text, "stop")
    return tuple(stops)


def _logprobs(fields: Fields) -> int | None:
    """How many likeliest tokens are told beside each chosen one; None if nothing is told."""
    wanted = fields.boolean("logprobs", False)
    top = fields.integer("top_logprobs", 0, MOST_LOGPROBS, None)
    if top is not None and not wanted:
        raise RequestError("top_logprobs needs logprobs set to true", param="top_logprobs")
    return (top or 0) if wanted else None


def _pruning(fields: Fields) -> Pruning:
    value = fields.take("autoprune", None)
    if value is None:
        return Pruning()
    inner = Fields(value, "autoprune")
    kinds = {
        "budget": None,
        "ratio": Budget.ratio,
        "flops": Budget.flops,
        "kv_bytes": Budget.kv_bytes,
    }
    given = {kind: inner.take(kind, None) for kind in kinds}
    asked = {kind: amount for kind, amount in given.items() if amount is not None}
    if len(asked) > 1:
        raise RequestError(
            f"autoprune holds {' and '.join(asked)}; give one of them", param="autoprune"
        )
    budget: float | Budget | None = None
    for kind, amount in asked.items():
        budget = _budget(inner, kind, amount, kinds[kind])
    pruning = Pruning(budget, inner.text("method", None), inner.boolean("details", False))
    inner.finish({}, "budget, ratio, flops, kv_bytes, method and details")
    return pruning


def _budget(fields: Fields, kind: str, amount: Any, build: Any) -> float | Budget:
    fields.check_number(kind, amount, 0, MOST_BUDGET)
    try:
        made = Budget.tokens(amount) if build is None else build(amount)
    except ValueError as error:
        path = fields.path(kind)
        raise RequestError(f"{path} is {shown(amount)}: {error}", param=path) from None
    return amount if build is None else made
