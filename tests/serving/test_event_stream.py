"""A client that reads nothing loses its place."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

import pytest

from autoprune.serving.exchange import CLIENT_LEFT, EventStream


class Exchange:
    """What a stream knows of its request."""

    seconds = 0.05

    def __init__(self) -> None:
        self.ended: list[int] = []

    def end(self, status: int) -> None:
        self.ended.append(status)


async def lines() -> AsyncGenerator[bytes, None]:
    yield b"one"
    yield b"two"


@pytest.mark.parametrize("read", [0, 1, 2])
def test_a_client_that_stops_reading_is_let_go(read: int) -> None:
    given: list[Any] = []

    async def send(message: dict[str, Any]) -> None:
        if len(given) == read:
            await asyncio.sleep(60)
        given.append(message)

    exchange: Any = Exchange()
    asyncio.run(asyncio.wait_for(EventStream(lines(), exchange)({}, None, send), 10))
    assert len(given) == read
    assert exchange.ended == [CLIENT_LEFT]


def test_a_client_that_reads_gets_everything() -> None:
    given: list[dict[str, Any]] = []

    async def send(message: dict[str, Any]) -> None:
        given.append(message)

    exchange: Any = Exchange()
    asyncio.run(EventStream(lines(), exchange)({}, None, send))
    assert [message.get("body") for message in given] == [None, b"one", b"two", b""]
