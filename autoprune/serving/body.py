"""Reading a request's body within limits, and noticing that its client has left."""

from __future__ import annotations

import asyncio
import time
from typing import Any, NoReturn

from fastapi import Request

from .errors import RequestError
from .limits import Limits

_READ_ON_SECONDS = 2.0


class ClientGone(Exception):
    """The client has closed the connection; nobody waits for an answer."""


async def read_body(request: Request, limits: Limits) -> bytes:
    """The whole body.

    Raises:
        RequestError: it is too large, or did not come in time.
        ClientGone: the client left.
    """
    too_large = RequestError(
        f"the body is larger than {limits.body_bytes} bytes; send smaller pictures", 413
    )
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        # Without this, pages of any site could have a browser ask a server on its own machine.
        wanted = "the body must be JSON; send the header Content-Type: application/json"
        await refuse(request, RequestError(wanted, 415), limits)
    announced = request.headers.get("content-length", "")
    if announced.isdecimal() and int(announced) > limits.body_bytes:
        await refuse(request, too_large, limits)
    end = time.monotonic() + limits.body_seconds
    body = bytearray()
    while True:
        try:
            left = max(0.0, end - time.monotonic())
            message = await asyncio.wait_for(request.receive(), left)
        except asyncio.TimeoutError:
            raise RequestError(
                f"the body did not come within {limits.body_seconds} seconds", 408
            ) from None
        body += _content(message)
        if len(body) > limits.body_bytes:
            await refuse(request, too_large, limits)
        if not message.get("more_body"):
            return bytes(body)


async def refuse(request: Request, error: RequestError, limits: Limits) -> NoReturn:
    """Raise the error for a request whose body was not read to its end.

    Some more of it is taken in before: a client that still writes would not see the answer.
    """
    end, taken = time.monotonic() + _READ_ON_SECONDS, 0
    while taken < 4 * limits.body_bytes and (left := end - time.monotonic()) > 0:
        try:
            message = await asyncio.wait_for(request.receive(), left)
        except asyncio.TimeoutError:
            break
        taken += len(_content(message))
        if not message.get("more_body"):
            break
    raise error


def _content(message: Any) -> bytes:
    if message["type"] == "http.disconnect":
        raise ClientGone
    return bytes(message.get("body", b""))


async def wait_until_gone(request: Request) -> None:
    """Returns when the client has closed the connection; for after the body was read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
