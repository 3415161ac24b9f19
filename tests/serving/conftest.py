"""A small model behind a real port, and ways to talk to it."""

from __future__ import annotations

import base64
import io
import json
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.client import HTTPConnection
from typing import Any

import pytest
import torch
import uvicorn
from PIL import Image

from autoprune import AutoPrune, create, tiny
from autoprune.loading import Loaded
from autoprune.serving.app import make_app
from autoprune.serving.job import Event, Finished, Job, Piece
from autoprune.serving.limits import Limits
from autoprune.serving.service import Options, Service
from autoprune.tiny.recipe.architecture import build_model
from autoprune.tiny.recipe.chat import make_processor

LAYERS = 6
VISUAL = 144
BUDGET = 36
LIMITS = Limits(
    body_bytes=200_000,
    body_seconds=2,
    picture_bytes=100_000,
    picture_pixels=1_000_000,
    pictures=3,
    messages=8,
    text_characters=4000,
    max_tokens=512,
    queue=12,
    batch_size=8,
)


def data_uri(image: Image.Image, kind: str = "png") -> str:
    file = io.BytesIO()
    image.save(file, kind.upper())
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"


def picture(uri: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": uri}}


def text(words: str) -> dict[str, Any]:
    return {"type": "text", "text": words}


@pytest.fixture(scope="session")
def scene() -> Image.Image:
    return tiny.draw_scene(3).image


@pytest.fixture(scope="session")
def uri(scene: Image.Image) -> str:
    return data_uri(scene)


@pytest.fixture(scope="session")
def loaded() -> Loaded:
    """The embedded model's architecture with fewer layers and random weights: it hardly ever ends by itself."""
    torch.manual_seed(0)
    processor = make_processor()
    model = build_model(processor.tokenizer, layers=LAYERS, vision_layers=2).eval()
    return Loaded(model, processor, "small")


@pytest.fixture(scope="session")
def service(loaded: Loaded) -> Service:
    methods = {"autoprune": AutoPrune(BUDGET), "fastv": create("fastv", BUDGET)}
    return Service(loaded, methods, Options(limits=LIMITS, default_tokens=4))


JSON = {"Content-Type": "application/json"}


@dataclass
class Reply:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def message(self) -> str:
        return str(self.json["error"]["message"])

    @property
    def content(self) -> str:
        return str(self.json["choices"][0]["message"]["content"])


@dataclass
class Client:
    """Sends requests to a server on this machine."""

    port: int
    uri: str

    def ask(self, words: str = "what shape is cyan?", **fields: Any) -> Reply:
        """A question about the picture; fields are added to the request."""
        return self.post(self.body(words, **fields))

    def body(self, words: str = "what shape is cyan?", **fields: Any) -> dict[str, Any]:
        content = [picture(self.uri), text(words)]
        return {"messages": [{"role": "user", "content": content}], "max_tokens": 3, **fields}

    def post(self, body: Any, headers: dict[str, str] | None = None) -> Reply:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        return self.send("POST", "/v1/chat/completions", data, headers)

    def send(
        self, verb: str, path: str, data: Any = None, headers: dict[str, str] | None = None
    ) -> Reply:
        connection = self.connection()
        try:
            connection.request(verb, path, data, {**JSON, **(headers or {})})
            answer = connection.getresponse()
            return Reply(answer.status, dict(answer.getheaders()), answer.read())
        finally:
            connection.close()

    def connection(self) -> HTTPConnection:
        return HTTPConnection("127.0.0.1", self.port, timeout=60)

    def metric(self, name: str) -> float:
        lines = self.send("GET", "/metrics").body.decode().splitlines()
        return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(name))


@pytest.fixture(scope="session")
def start(uri: str) -> Iterator[Callable[[Service], Client]]:
    """Starts a service on a port of its own; all end with the session."""
    running = []

    def begin(service: Service) -> Client:
        config = uvicorn.Config(make_app(service), log_config=None, port=0, lifespan="on")
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, daemon=True)
        thread.start()
        running.append((server, thread))
        wait_until(lambda: server.started)
        return Client(server.servers[0].sockets[0].getsockname()[1], uri)

    yield begin
    for server, thread in running:
        server.should_exit = True
        thread.join(10)


@pytest.fixture(scope="session")
def client(service: Service, start: Callable[[Service], Client]) -> Client:
    return start(service)


def wait_until(condition: Callable[[], Any], seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


@dataclass
class Told:
    """What an engine told of a job."""

    events: list[Event] = field(default_factory=list)

    @property
    def text(self) -> str:
        return "".join(event.text for event in self.events if isinstance(event, Piece))

    @property
    def finished(self) -> Finished:
        (end,) = [event for event in self.events if isinstance(event, Finished)]
        return end

    @property
    def error(self) -> Any:
        (end,) = [event for event in self.events if isinstance(event, Exception)]
        return end


@pytest.fixture
def make_job(service: Service, uri: str) -> Callable[..., tuple[Job, Told]]:
    """A job without a server, and what it will be told."""

    def make(words: str = "what shape is cyan?", pictures: int = 1, **fields: Any) -> Any:
        content = [picture(uri)] * pictures + [text(words)]
        body = {"messages": [{"role": "user", "content": content}], "max_tokens": 3, **fields}
        told = Told()
        return service.job(json.dumps(body).encode(), told.events.append), told

    return make
