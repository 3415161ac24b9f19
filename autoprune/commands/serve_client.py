"""A client of `autoprune serve`, which measures how its requests fare. The standard library alone."""

from __future__ import annotations

import json
import threading
import time
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection
from typing import Any
from urllib.parse import urlsplit

MOST_SECONDS = 600.0
"""For one request, with its waits."""
_MOST_WAIT = 30.0


class Lost(Exception):
    """A request that got no answer; the text says why."""


@dataclass(frozen=True)
class Answered:
    """One answer.

    first_seconds: until its first text, seconds: until its end. Both from the first try on.
    retries: tries that were told 429.
    usage: as the server gave it.
    """

    first_seconds: float
    seconds: float
    retries: int
    usage: dict[str, Any]

    @property
    def tokens(self) -> int:
        return int(self.usage["completion_tokens"])


class Address:
    """Where a server is, and how it is spoken to.

    Raises:
        ValueError: the URL is none of HTTP.
    """

    def __init__(self, url: str, api_key: str | None = None) -> None:
        parts = urlsplit(url)
        try:
            self._host, self._port = parts.hostname, parts.port
        except ValueError:
            self._host = None
        if parts.scheme not in ("http", "https") or not self._host or parts.query or parts.fragment:
            raise ValueError(
                f"--serve expects the address of a server, such as http://127.0.0.1:8000, got {url!r}"
            )
        self.url, self._secure = url, parts.scheme == "https"
        self._path = parts.path.rstrip("/").removesuffix("/v1")
        self._headers = {"Content-Type": "application/json"}
        if api_key is not None:
            if not (api_key.isascii() and api_key.isprintable()):
                raise ValueError("--api-key holds characters that no header can have")
            self._headers["Authorization"] = f"Bearer {api_key}"

    def connect(self) -> HTTPConnection:
        """A connection, which opens with its first request."""
        kind = HTTPSConnection if self._secure else HTTPConnection
        return kind(str(self._host), self._port, timeout=MOST_SECONDS)

    def send(self, connection: HTTPConnection, path: str, body: Any = None) -> HTTPResponse:
        """Ask for a path; with a body, post it."""
        data = None if body is None else json.dumps(body).encode()
        verb = "GET" if body is None else "POST"
        connection.request(verb, self._path + path, data, self._headers)
        return connection.getresponse()

    def get(self, path: str) -> tuple[int, bytes]:
        """Status and body.

        Raises:
            ValueError: nobody answers there.
        """
        connection = self.connect()
        try:
            response = self.send(connection, path)
            return response.status, response.read()
        except (OSError, HTTPException) as error:
            raise ValueError(
                f"no server answers at {self.url}: {str(error) or type(error).__name__}; start one with "
                "`autoprune serve`"
            ) from error
        finally:
            connection.close()

    def model(self) -> dict[str, Any]:
        """What the server says of its model.

        Raises:
            ValueError: it wants a key, or is no server of autoprune.
        """
        status, body = self.get("/v1/models")
        if status in (401, 403):
            message = error_message(body) or "it refuses this client"
            raise ValueError(f"{self.url} answers {status}: {message} (here: --api-key)")
        try:
            (model,) = json.loads(body)["data"]
            _ = model["autoprune"]["methods"], model["id"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"the server at {self.url} is none of autoprune (its /v1/models answers {status}); start "
                "one with `autoprune serve`"
            ) from error
        return dict(model)

    def metrics(self) -> dict[str, float]:
        """Those of /metrics that have no label; empty if there are none."""
        status, body = self.get("/metrics")
        found = {}
        for line in body.decode("utf-8", "replace").splitlines() if status == 200 else ():
            name, _, value = line.partition(" ")
            if not line.startswith("#") and "{" not in name:
                found[name] = float(value)
        return found

    def ask(
        self, connection: HTTPConnection, body: dict[str, Any], ended: threading.Event
    ) -> Answered:
        """Ask and read the streamed answer; after 429, again when the server said.

        Raises:
            Lost: the server or the connection failed.
            ValueError: the server refuses such a request.
        """
        begun, retries = time.monotonic(), 0
        while True:
            try:
                response = self.send(connection, "/v1/chat/completions", body)
                if response.status == 200:
                    return _read(response, begun, retries)
                message = error_message(response.read())
            except (OSError, HTTPException) as error:
                raise Lost(str(error) or type(error).__name__) from error
            if response.status != 429:
                kind = Lost if response.status >= 500 else ValueError
                told = message or "it says nothing of why"
                raise kind(f"the server answers {response.status} to a request: {told}")
            retries += 1
            wait = _seconds(response.headers.get("Retry-After"))
            if time.monotonic() + wait - begun > MOST_SECONDS:
                raise Lost(f"the server was full for {MOST_SECONDS:.0f} seconds")
            if ended.wait(wait):
                raise Lost("the measurement was ended")


def error_message(body: bytes) -> str | None:
    """The message of an error in OpenAI's form."""
    try:
        return str(json.loads(body)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return None


def _seconds(retry_after: str | None) -> float:
    """How long to wait; the header may also hold a date, which is not read."""
    known = retry_after is not None and retry_after.isdecimal()
    return min(float(retry_after or 1), _MOST_WAIT) if known else 1.0


def _read(response: HTTPResponse, begun: float, retries: int) -> Answered:
    """The answer in a stream of events."""
    first: float | None = None
    usage: dict[str, Any] | None = None
    for line in response:
        event = line.decode("utf-8", "replace").strip().removeprefix("data: ")
        if event == "[DONE]":
            response.read()
            break
        if not event:
            continue
        chunk = json.loads(event)
        if "error" in chunk:
            raise Lost(f"an answer broke off: {error_message(line.removeprefix(b'data: '))}")
        if first is None and any(choice["delta"].get("content") for choice in chunk["choices"]):
            first = time.monotonic() - begun
        usage = chunk.get("usage") or usage
    if usage is None:
        raise Lost("an answer broke off")
    seconds = time.monotonic() - begun
    return Answered(seconds if first is None else first, seconds, retries, usage)
