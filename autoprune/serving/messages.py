"""The messages of a request: who says what, and which pictures are shown."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from .errors import RequestError
from .fields import LEAVE_OUT, Fields, whole_text
from .limits import Limits

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


def parse_messages(fields: Fields, limits: Limits) -> tuple[Message, ...]:
    """The messages of a request.

    Raises:
        RequestError: one of them cannot be right, or there are too many, or too much in them.
    """
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
        {"name": LEAVE_OUT, "refusal": LEAVE_OUT, "tool_calls": LEAVE_OUT}, "role and content"
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
