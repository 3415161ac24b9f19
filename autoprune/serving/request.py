"""The JSON of `/v1/chat/completions` as a `Request`: read and checked, before anything runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from ..policy.budget import Budget
from .errors import RequestError
from .fields import Fields, shown, whole_text
from .limits import Limits

MOST_TEMPERATURE = 2.0
MOST_LOGPROBS = 20
MOST_STOPS = 4
MOST_BUDGET = 1e18
SEEDS = (-(2**63), 2**63 - 1)

KNOWN = (
    "model, messages, stream, stream_options, max_tokens, max_completion_tokens, temperature, top_p, seed, "
    "stop, logprobs, top_logprobs, n, user and autoprune"
)
_LEAVE_OUT = "leave it out"
UNSUPPORTED = {
    "tools": _LEAVE_OUT,
    "tool_choice": _LEAVE_OUT,
    "parallel_tool_calls": _LEAVE_OUT,
    "functions": _LEAVE_OUT,
    "function_call": _LEAVE_OUT,
    "response_format": "answers are plain text; leave it out",
    "logit_bias": _LEAVE_OUT,
    "presence_penalty": _LEAVE_OUT,
    "frequency_penalty": _LEAVE_OUT,
    "modalities": "answers are text; leave it out",
    "audio": "answers are text; leave it out",
    "prediction": _LEAVE_OUT,
    "reasoning_effort": _LEAVE_OUT,
    "store": "nothing is stored; leave it out",
    "metadata": "nothing is stored; leave it out",
    "service_tier": _LEAVE_OUT,
    "web_search_options": _LEAVE_OUT,
    "top_k": "use temperature and top_p",
    "min_p": "use temperature and top_p",
    "best_of": "send several requests",
    "echo": _LEAVE_OUT,
    "suffix": _LEAVE_OUT,
    "autoprune_budget": 'write "autoprune": {"budget": 36}',
}

Role = Literal["system", "user", "assistant"]


@dataclass(frozen=True)
class Part:
    """A piece of a message: a text, or the address of a picture.

    path: its name in the request.
    """

    path: str
    text: str | None = None
    picture: str | None = None


@dataclass(frozen=True)
class Message:
    """One message of the conversation."""

    role: Role
    parts: tuple[Part, ...]


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
    messages = _messages(fields, limits)
    stream = fields.boolean("stream", False)
    fields.integer("n", 1, 1, 1)
    fields.text("user", None)
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


def _messages(fields: Fields, limits: Limits) -> tuple[Message, ...]:
    entries = fields.array("messages", 1, limits.messages)
    messages = tuple(_message(entry, f"messages[{i}]") for i, entry in enumerate(entries))
    parts = [part for message in messages for part in message.parts]
    pictures = sum(part.picture is not None for part in parts)
    if pictures > limits.pictures:
        raise RequestError(
            f"the messages hold {pictures} pictures, and at most {limits.pictures} are taken",
            param="messages",
        )
    characters = sum(len(part.text or "") for part in parts)
    if characters > limits.text_characters:
        raise RequestError(
            f"the messages hold {characters} characters, and at most {limits.text_characters} are taken",
            param="messages",
        )
    if messages[-1].role != "user":
        raise RequestError(
            f"the last message must be the user's, got one of {messages[-1].role!r}",
            param="messages",
        )
    return messages


def _message(value: Any, name: str) -> Message:
    fields = Fields(value, name)
    role = fields.text("role")
    if role == "developer":  # OpenAI's newer word
        role = "system"
    if role not in ("system", "user", "assistant"):
        raise fields.wrong("role", "system, user or assistant", role)
    content = fields.take("content")
    if isinstance(content, str):
        parts = [Part(f"{name}.content", text=whole_text(content, f"{name}.content"))]
    elif isinstance(content, list) and content:
        parts = [_part(entry, f"{name}.content[{i}]") for i, entry in enumerate(content)]
    else:
        raise fields.wrong("content", "a string, or a list of text and image_url parts", content)
    fields.finish(
        {"name": _LEAVE_OUT, "refusal": _LEAVE_OUT, "tool_calls": _LEAVE_OUT}, "role and content"
    )
    if not any(part.picture or (part.text or "").strip() for part in parts):
        raise RequestError(f"{name}.content is empty", param=f"{name}.content")
    for part in parts:
        if part.picture is not None and role != "user":
            raise RequestError(
                f"{part.path} is a picture in a message of {role!r}; pictures belong to the user's",
                param=part.path,
            )
    return Message(role, tuple(parts))


def _part(value: Any, name: str) -> Part:
    fields = Fields(value, name)
    kind = fields.text("type")
    if kind == "text":
        part = Part(name, text=fields.text("text"))
        fields.finish({}, "type and text")
        return part
    if kind == "image_url":
        address = Fields(fields.take("image_url"), fields.path("image_url"))
        part = Part(address.path("url"), picture=address.text("url"))
        if address.text("detail", "auto") not in ("auto", "low", "high"):
            raise RequestError(f"{name}.image_url.detail must be auto, low or high", param=name)
        address.finish({}, "url and detail")
        fields.finish({}, "type and image_url")
        return part
    raise fields.wrong("type", "text or image_url", kind)


def _usage_in_stream(fields: Fields, stream: bool) -> bool:
    options = fields.take("stream_options", None)
    if options is None:
        return False
    inner = Fields(options, "stream_options")
    wanted = inner.boolean("include_usage", False)
    inner.finish({"include_obfuscation": _LEAVE_OUT}, "include_usage")
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
