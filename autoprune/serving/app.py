"""The routes of the server."""

from __future__ import annotations

import asyncio
import hmac
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import Depends, FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response

from .body import ClientGone, refuse
from .errors import RequestError
from .exchange import answer_request
from .metrics import CONTENT_TYPE
from .service import Service

LOCAL = ("127.0.0.1", "localhost", "::1")
"""Addresses that only this machine reaches."""


def make_app(service: Service, host: str = LOCAL[0]) -> FastAPI:
    """The application; it starts the service, and closes it at its end.

    Args:
        host: what it listens on.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.start()
        yield
        await asyncio.to_thread(service.close)

    # The pages of documentation would fetch scripts from elsewhere.
    app = FastAPI(
        title="autoprune", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None
    )
    started = int(time.time())

    async def check_key(request: Request) -> None:
        key = service.options.api_key
        given = request.headers.get("authorization", "")
        if key is None and host in LOCAL and request.url.hostname not in LOCAL:
            # The name of a web page's own site can be made to lead here.
            message = "this server is asked as localhost or 127.0.0.1; other names need an API key"
            await refuse(request, RequestError(message, 403), service.limits)
        if key is not None and not hmac.compare_digest(given.encode(), f"Bearer {key}".encode()):
            message = "the API key is missing or wrong; send it as Authorization: Bearer KEY"
            await refuse(request, RequestError(message, 401), service.limits)

    protected = [Depends(check_key)]

    @app.get("/health")
    async def health() -> Response:
        alive = service.engine.is_alive
        return JSONResponse({"status": "ok" if alive else "ending"}, 200 if alive else 503)

    @app.get("/metrics", dependencies=protected)
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type=CONTENT_TYPE)

    @app.get("/v1/models", dependencies=protected)
    async def models() -> Response:
        return JSONResponse({"object": "list", "data": [_model(service, started)]})

    @app.get("/v1/models/{name:path}", dependencies=protected)
    async def model(name: str) -> Response:
        if name != service.name:
            message = f"this server has the model {service.name!r} alone"
            raise RequestError(message, 404, "model", "model_not_found")
        return JSONResponse(_model(service, started))

    @app.post("/v1/chat/completions", dependencies=protected)
    async def chat(request: Request) -> Response:
        return await answer_request(service, request)

    @app.exception_handler(RequestError)
    async def refused(request: Request, error: RequestError) -> Response:
        return _error_response(error)

    @app.exception_handler(ClientGone)
    async def gone(request: Request, error: ClientGone) -> Response:
        return Response(status_code=204)  # nobody reads it

    @app.exception_handler(HTTPException)
    async def unknown(request: Request, error: HTTPException) -> Response:
        message = f"there is no {request.method} {request.url.path[:100]} here"
        return _error_response(RequestError(message, error.status_code))

    return app


def _error_response(error: RequestError) -> Response:
    """An error as OpenAI's servers send it."""
    return JSONResponse(error.body, error.status, headers=error.headers)


def _model(service: Service, started: int) -> dict[str, Any]:
    allowed = {name: str(method.budget) for name, method in service.allowed.methods.items()}
    return {
        "id": service.name,
        "object": "model",
        "created": started,
        "owned_by": "autoprune",
        "autoprune": {"default_method": service.allowed.default, "methods": allowed},
    }
