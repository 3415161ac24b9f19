"""One request to its end: the body in, the answer out, and what happens when the client leaves."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from fastapi import Request
from starlette.responses import JSONResponse, Response

from .answers import Answer
from .body import ClientGone, read_body, refuse, wait_until_gone
from .errors import RequestError
from .job import Event, Finished, Job, Piece
from .service import Service, Visit

log = logging.getLogger(__name__)

CLIENT_LEFT = 499
"""The status in logs and metrics of a request whose client did not wait; nobody sees it."""


async def answer_request(service: Service, request: Request) -> Response:
    """The response to a chat request.

    Raises:
        RequestError: it is refused, or failed before anything of the answer was sent.
        ClientGone: the client left.
    """
    if service.is_full:
        await refuse(request, service.full(), service.limits)
    exchange = Exchange(service, request)
    try:
        answer = await exchange.begin()
        if answer.job.request.stream:
            # An error before the first token still gets a status of its own.
            first = await exchange.next_event()
            return EventStream(_streamed(exchange, answer, first), exchange)
        pieces: list[Piece] = []
        while isinstance(event := await exchange.next_event(), Piece):
            pieces.append(event)
        exchange.end(200, event)
        return JSONResponse(answer.whole(pieces, event))
    except ClientGone:
        exchange.end(CLIENT_LEFT)
        raise
    except RequestError as error:
        exchange.end(error.status, param=error.param)
        raise
    except BaseException:
        exchange.end(500)
        raise


class Exchange:
    """A request that is being answered."""

    def __init__(self, service: Service, request: Request) -> None:
        self._service, self._request = service, request
        self._arrived = time.monotonic()
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[Event | ClientGone] = asyncio.Queue()
        self._watching: asyncio.Task[None] | None = None
        self._job: Job | None = None
        self._ended = False
        self._visit = Visit(service)

    async def begin(self) -> Answer:
        """Read, prepare and queue the request.

        Raises:
            RequestError: it is refused.
            ClientGone: the client left.
        """
        body = await read_body(self._request, self._service.limits)
        self._watching = asyncio.create_task(self._watch())
        prepare = self._service.job
        job = await self._loop.run_in_executor(self._service.pool, prepare, body, self._tell)
        job.arrived = self._arrived
        self._job = job
        self._service.engine.submit(job)
        self._visit.queued()
        return Answer(job, self._service.name)

    @property
    def seconds(self) -> float:
        """How long an answer may take, and a client may not read."""
        return self._service.limits.seconds

    async def next_event(self) -> Piece | Finished:
        """The next event of the job.

        Raises:
            RequestError: the job failed, or takes too long.
            ClientGone: the client left.
        """
        seconds = self._service.limits.seconds
        left = self._arrived + seconds - time.monotonic()
        try:
            event = await asyncio.wait_for(self._events.get(), max(0.0, left))
        except asyncio.TimeoutError:
            raise RequestError(
                f"the answer took longer than {seconds} seconds; ask for fewer tokens, or try later",
                504,
                retry_after=5,
            ) from None
        if isinstance(event, Exception):
            raise event
        return event

    def end(self, status: int, finished: Finished | None = None, param: str | None = None) -> None:
        """Count and log it, and free what it held; harmless when said twice."""
        if self._ended:
            return
        self._ended = True
        if self._watching is not None:
            self._watching.cancel()
        if self._job is not None and finished is None:
            self._job.cancel()
        self._visit.leave()
        metrics = self._service.metrics
        metrics.requests.labels(str(status)).inc()
        if status == CLIENT_LEFT:
            metrics.cancelled.inc()
        if finished is not None and self._job is not None:
            metrics.finished(self._job, finished)
        log.info("request", extra={"fields": self._record(status, finished, param)})

    def _record(self, status: int, finished: Finished | None, param: str | None) -> dict[str, Any]:
        """What the log says of it: no text of the request or the answer."""
        now = time.monotonic()
        record: dict[str, Any] = {"status": status, "seconds": round(now - self._arrived, 4)}
        if param is not None:
            record["param"] = param
        if (job := self._job) is not None:
            record |= {
                "method": job.method_name,
                "budget": job.method.budget.expression,
                "prompt_tokens": job.prompt.length,
                "visual_tokens": job.prompt.num_visual,
                "stream": job.request.stream,
            }
            if job.started is not None:
                record["queue_seconds"] = round(job.started - job.arrived, 4)
            if job.first_token is not None:
                record["first_token_seconds"] = round(job.first_token - job.arrived, 4)
        if finished is not None:
            record |= {
                "tokens": finished.tokens,
                "batch_size": finished.batch_size,
                "visual_tokens_per_layer": finished.sample.mean_tokens,
            }
        return record

    async def _watch(self) -> None:
        await wait_until_gone(self._request)
        if self._job is not None:
            self._job.cancel()
        self._events.put_nowait(ClientGone())

    def _tell(self, event: Event) -> None:
        """Called in the engine's thread."""
        try:
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)
        except RuntimeError:
            log.debug("an answer came when the server had ended")


class EventStream(Response):
    """Server-sent events; what makes them ends when this does."""

    media_type = "text/event-stream"

    def __init__(self, lines: AsyncGenerator[bytes, None], exchange: Exchange) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._lines, self._exchange = lines, exchange

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def give(message: dict[str, Any]) -> None:
            # A client that reads nothing must not hold its place for ever.
            await asyncio.wait_for(send(message), self._exchange.seconds)

        try:
            async with aclosing(self._lines) as lines:
                headers = self.raw_headers
                await give({"type": "http.response.start", "status": 200, "headers": headers})
                async for line in lines:
                    await give({"type": "http.response.body", "body": line, "more_body": True})
            await give({"type": "http.response.body", "body": b"", "more_body": False})
        except asyncio.TimeoutError:
            log.info("a client did not read its answer")
        finally:
            # Lines that never began do not end the exchange themselves.
            self._exchange.end(CLIENT_LEFT)


async def _streamed(
    exchange: Exchange, answer: Answer, event: Piece | Finished
) -> AsyncGenerator[bytes, None]:
    """The events of an answer whose first one is there."""
    status = CLIENT_LEFT
    finished = None
    try:
        yield _line(answer.begin())
        while isinstance(event, Piece):
            yield _line(answer.piece(event))
            event = await exchange.next_event()
        status, finished = 200, event
        for chunk in answer.end(event):
            yield _line(chunk)
        yield b"data: [DONE]\n\n"
    except ClientGone:
        pass
    except RequestError as error:
        status = error.status
        yield _line(error.body)
    finally:
        exchange.end(status, finished)


def _line(chunk: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(chunk, ensure_ascii=False).encode("utf-8", "replace") + b"\n\n"
