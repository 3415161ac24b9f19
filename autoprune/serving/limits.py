"""How large a request may be."""

from __future__ import annotations

from dataclasses import dataclass, fields


@dataclass(frozen=True)
class Limits:
    """What a single request may ask for, and how many may wait.

    Attributes:
        body_bytes: of the request's body.
        body_seconds: until the whole body must be there.
        picture_bytes: of one encoded picture, before base64.
        picture_pixels: width times height of one picture.
        pictures: in one request.
        messages: in one request.
        text_characters: in all messages together.
        max_tokens: of an answer; a request that asks for more is refused.
        queue: requests that are read, wait or are being prepared.
        batch_size: requests that are answered together.
        seconds: from arrival to the end of the answer.
    """

    body_bytes: int = 16 * 2**20
    body_seconds: int = 30
    picture_bytes: int = 8 * 2**20
    picture_pixels: int = 25_000_000
    pictures: int = 4
    messages: int = 64
    text_characters: int = 100_000
    max_tokens: int = 1024
    queue: int = 64
    batch_size: int = 8
    seconds: int = 300

    def __post_init__(self) -> None:
        for limit in fields(self):
            value = getattr(self, limit.name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{limit.name} must be a whole number of 1 or more, got {value!r}")
