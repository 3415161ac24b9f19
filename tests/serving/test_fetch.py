"""Pictures from addresses: from allowed hosts alone, within limits, and never from somewhere else."""

from __future__ import annotations

import io
import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from PIL import Image

from autoprune.serving import fetch
from autoprune.serving.errors import RequestError
from autoprune.serving.fetch import Fetcher, _is_public
from autoprune.serving.messages import Part
from autoprune.serving.pictures import Pictures

from .conftest import LIMITS


class Site(BaseHTTPRequestHandler):
    picture = b""
    asked: list[str] = []  # noqa: RUF012 - what all requests asked for

    def do_GET(self) -> None:
        self.asked.append(self.path)
        if self.path == "/moved":
            self.send_response(302)
            self.send_header("Location", "/picture.png?a=1")
            self.end_headers()
            return
        self.send_response(404 if self.path == "/none" else 200)
        self.end_headers()
        try:
            for _ in range(100 if self.path == "/slow" else 0):
                self.wfile.write(b"a")
                time.sleep(0.05)
            self.wfile.write(b"a" * 200_000 if self.path == "/large" else self.picture)
        except OSError:
            pass  # the client has had enough

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture(scope="module")
def site(scene: Image.Image) -> Iterator[str]:
    file = io.BytesIO()
    scene.save(file, "PNG")
    Site.picture = file.getvalue()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Site)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"127.0.0.1:{server.server_port}"
    server.shutdown()


def load(host: str, address: str) -> Image.Image:
    fetcher = Fetcher([host], LIMITS.picture_bytes)
    return Pictures(LIMITS, fetcher=fetcher).load(Part("p", picture=address))


def test_a_picture_of_an_allowed_host_is_fetched(site: str, scene: Image.Image) -> None:
    got = load(site, f"http://{site}/picture.png?a=1")
    assert got.tobytes() == scene.convert("RGB").tobytes()
    assert Site.asked[-1] == "/picture.png?a=1"


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("/moved", "status 302"),
        ("/none", "status 404"),
        ("/large", "more than 100000 bytes"),
        ("/slow", "did not answer in time"),
    ],
)
def test_what_cannot_be_had_is_one_sentence(
    site: str, path: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch, "SECONDS", 1.0)
    asked = len(Site.asked)
    with pytest.raises(RequestError, match=said):
        load(site, f"http://{site}{path}")
    assert Site.asked[asked:] == [path]


@pytest.mark.parametrize(
    "address",
    [
        "http://127.0.0.1:1/a.png",
        "http://127.0.0.2:{port}/a.png",
        "http://localhost:{port}/a.png",
        "http://127.0.0.1/a.png",
        "http://user@127.0.0.1:{port}/a.png",
        "http://127.0.0.1:{port}@other.invalid/a.png",
        "http://other.invalid/127.0.0.1:{port}",
        "http://[::1]:{port}/a.png",
        "httpx://127.0.0.1:{port}/a.png",
        "http://127.0.0.1:99999/a.png",
        "http:///a.png",
    ],
)
def test_other_hosts_are_never_asked(site: str, address: str) -> None:
    asked = len(Site.asked)
    with pytest.raises(RequestError, match=r"not allowed|no http or https"):
        load(site, address.replace("{port}", site.split(":")[1]))
    assert len(Site.asked) == asked


def test_a_name_that_leads_into_a_private_network_is_refused(
    site: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    port = site.split(":")[1]
    for number in ("127.0.0.1", "10.0.0.5", "169.254.169.254", "fd00::1", "0.0.0.0"):
        found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (number, int(port)))]
        monkeypatch.setattr(socket, "getaddrinfo", lambda *_, found=found, **__: found)
        with pytest.raises(RequestError, match="private network"):
            load(f"images.example.org:{port}", f"http://images.example.org:{port}/a.png")


def test_a_host_that_has_no_address_or_no_certificate_is_one_sentence(site: str) -> None:
    with pytest.raises(RequestError, match="cannot be had"):
        load("nowhere.invalid", "https://nowhere.invalid/a.png")
    with pytest.raises(RequestError, match=r"cannot be had|in time"):
        load(site, f"https://{site}/a.png")
    with pytest.raises(ValueError, match="a host is written as"):
        Fetcher(["http://a.org/"], 5)


@pytest.mark.parametrize(
    ("number", "public"),
    [
        ("8.8.8.8", True),
        ("2001:4860:4860::8888", True),
        ("10.0.0.1", False),
        ("127.0.0.1", False),
        ("224.0.0.1", False),
        ("::1", False),
        ("::a00:1", False),  # 10.0.0.1, by three old and new ways
        ("2002:a00:1::", False),
        ("64:ff9b::a00:1", False),
        ("ff02::1", False),
    ],
)
def test_what_leads_into_a_private_network_is_not_public(number: str, public: bool) -> None:
    assert _is_public(number) is public
