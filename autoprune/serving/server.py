"""Start the server on a port."""

from __future__ import annotations

import logging
import socket

import uvicorn

from .app import LOCAL, make_app
from .logs import set_up
from .service import Service

log = logging.getLogger(__name__)


def serve(service: Service, host: str, port: int, grace: int) -> None:
    """Answer until the process is told to end; then what was begun is finished, for `grace` seconds at most.

    Raises:
        ValueError: the address cannot be had.
    """
    set_up()
    with _socket(host, port) as taken:
        if host not in LOCAL and service.options.api_key is None:
            log.warning("anybody who reaches %s can use this server: there is no API key", host)
        config = uvicorn.Config(
            make_app(service, host),
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=grace,
            timeout_keep_alive=30,
            # The same parser with the same limits, whatever else is installed.
            http="h11",
        )
        log.info(
            "listening",
            extra={
                "fields": {
                    "url": f"http://{host}:{taken.getsockname()[1]}/v1",
                    "model": service.name,
                    "methods": list(service.allowed.methods),
                }
            },
        )
        uvicorn.Server(config).run(sockets=[taken])


def _socket(host: str, port: int) -> socket.socket:
    """Taken before the server starts, so that an address that is in use is one sentence."""
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family)
    except (OSError, OverflowError) as error:
        raise ValueError(
            f"cannot listen on {host}:{port}: {error}; choose another --port"
        ) from error
