"""Pictures from `http:` addresses, of hosts that the server allows by name."""

from __future__ import annotations

import ipaddress
import re
import socket
import ssl
import time
from collections.abc import Sequence
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from urllib.parse import SplitResult, urlsplit

from .errors import RequestError

SECONDS = 5.0
_PORTS = {"http": 80, "https": 443}
_HOST = re.compile(r"(\[[0-9a-f:.]+\]|[a-z0-9._-]+)(:\d{1,5})?", re.IGNORECASE)


@dataclass(frozen=True)
class Fetcher:
    """Fetches from the hosts it was given, and from no other.

    Redirects are not followed. A name is looked up once, and is refused where it leads into a private network.
    An address that is allowed as a number may be private.

    Args:
        hosts: as "images.example.org", or with a port; without one, the usual ports.
        most: bytes of a picture.

    Raises:
        ValueError: this is no host.
    """

    hosts: Sequence[str]
    most: int

    def __post_init__(self) -> None:
        for host in self.hosts:
            if not _HOST.fullmatch(host):
                raise ValueError(
                    f"a host is written as images.example.org or 10.0.0.5:8080, got {host!r}"
                )

    def fetch(self, address: str, path: str) -> bytes:
        """What is at the address.

        Args:
            path: the field that names it.

        Raises:
            RequestError: its host is not allowed, or it cannot be had.
        """
        url, host, port = self._allowed(address, path)
        try:
            number = _number_of(host, port)
            if number is None:
                raise _refused(path, "is at an address of a private network")
            return self._read(url, host, number, port, path)
        except (OSError, HTTPException, UnicodeError) as error:
            reason = (
                "did not answer in time" if isinstance(error, TimeoutError) else "cannot be had"
            )
            raise _refused(path, reason) from error

    def _allowed(self, address: str, path: str) -> tuple[SplitResult, str, int]:
        """The parts of an address whose host is allowed, its host and its port."""
        try:
            url = urlsplit(address)
            usual = _PORTS[url.scheme]
            host, port = url.hostname or "", url.port or usual
        except (KeyError, ValueError):
            raise _refused(path, "is no http or https address") from None
        wanted = {f"[{host}]" if ":" in host else host}
        if port != usual:
            wanted = {f"{name}:{port}" for name in wanted}
        if "@" in url.netloc or not wanted & {known.lower() for known in self.hosts}:
            listed = ", ".join(self.hosts)
            raise _refused(path, f"is of a host that is not allowed; there are {listed}")
        return url, host, port

    def _read(self, url: SplitResult, host: str, number: str, port: int, path: str) -> bytes:
        end = time.monotonic() + SECONDS
        connection = _connection(url.scheme, host, number, port)
        try:
            target = (url.path or "/") + (f"?{url.query}" if url.query else "")
            connection.request("GET", target, headers={"Accept": "image/*"})
            answer = connection.getresponse()
            if answer.status != 200:
                raise _refused(path, f"was answered with status {answer.status}, expected 200")
            content = bytearray()
            while part := answer.read1(65536):
                content += part
                if len(content) > self.most:
                    raise _refused(path, f"has more than {self.most} bytes")
                if time.monotonic() > end:
                    raise TimeoutError
            return bytes(content)
        finally:
            connection.close()


def _connection(scheme: str, host: str, number: str, port: int) -> HTTPConnection:
    """A connection to that very number, which asks for `host`."""
    sock = socket.create_connection((number, port), SECONDS)
    connection: HTTPConnection
    if scheme == "https":
        context = ssl.create_default_context()
        connection = HTTPSConnection(host, port, timeout=SECONDS, context=context)
        try:
            sock = context.wrap_socket(sock, server_hostname=host)
        except BaseException:
            sock.close()
            raise
    else:
        connection = HTTPConnection(host, port, timeout=SECONDS)
    connection.sock = sock
    return connection


_TRANSLATED = ipaddress.ip_network("64:ff9b::/96")


def _number_of(host: str, port: int) -> str | None:
    """The numeric address of a host; None if it is not one of the public internet."""
    try:
        return str(ipaddress.ip_address(host))
    except ValueError:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    numbers = [str(entry[4][0]) for entry in found]
    public = all(_is_public(number.partition("%")[0]) for number in numbers)
    return numbers[0] if public else None


def _is_public(number: str) -> bool:
    """Whether it is of the public internet, and no way into a private network by translation or tunnel."""
    address = ipaddress.ip_address(number)
    if isinstance(address, ipaddress.IPv6Address) and (
        address.sixtofour is not None or address in _TRANSLATED or int(address) < 2**32
    ):
        return False
    return address.is_global and not address.is_multicast


def _refused(path: str, why: str) -> RequestError:
    return RequestError(f"{path} {why}; send the picture as data:image/png;base64,...", param=path)
