"""The page as a program speaks to it: requests that no browser makes."""

from __future__ import annotations

import json
import socket
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from autoprune.cli import main
from autoprune.loading import load_embedded

pytest.importorskip("gradio")
from autoprune.web.page import MOST_BROWSERS, make_page


@pytest.fixture(scope="module")
def page() -> Iterator[Any]:
    made = make_page(load_embedded("cpu", "float32"))
    made.launch(quiet=True, prevent_thread_lock=True, server_port=free_port())
    yield made
    made.close()


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def ask(page: Any, picture: dict[str, Any]) -> str:
    """The events by which the server answers a question about a picture."""
    address = f"{page.local_url}gradio_api/call/told"
    data = json.dumps({"data": [picture, "what?", "divprune", 50, False]}).encode()
    headers = {"Content-Type": "application/json"}
    with urllib.request.urlopen(urllib.request.Request(address, data, headers)) as answer:
        event = json.load(answer)["event_id"]
    return urllib.request.urlopen(f"{address}/{event}").read().decode()


def upload(page: Any, path: Path) -> str:
    """Its path on the server."""
    head = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n'
    data = head + path.read_bytes() + b"\r\n--x--\r\n"
    headers = {"Content-Type": "multipart/form-data; boundary=x"}
    request = urllib.request.Request(f"{page.local_url}gradio_api/upload", data, headers)
    return json.load(urllib.request.urlopen(request))[0]


def test_a_picture_that_was_uploaded_is_answered_and_one_of_the_server_is_not(page, tmp_path):
    own = tmp_path / "own.png"
    Image.new("RGB", (64, 64), "red").save(own)
    assert "event: complete" in ask(page, {"path": upload(page, own)})
    for picture in (
        {"path": str(own)},
        {"path": str(own), "meta": {"_type": "gradio.FileData"}},
        {"path": "/dev/zero"},
        {"path": "http://192.0.2.1/own.png", "meta": {"_type": "gradio.FileData"}},
    ):
        told = ask(page, picture)
        assert "event: error" in told and "image.png" not in told
    assert "addresses are not fetched" in told


def test_a_drawn_scene_is_answered(page):
    address = f"{page.local_url}gradio_api/call/_draw"
    data = json.dumps({"data": ["colour"]}).encode()
    request = urllib.request.Request(address, data, {"Content-Type": "application/json"})
    event = json.load(urllib.request.urlopen(request))["event_id"]
    told = urllib.request.urlopen(f"{address}/{event}").read().decode()
    picture, question = json.loads(told.split("data: ")[1])
    assert question.startswith("what")
    assert "event: complete" in ask(page, picture)


def test_an_address_in_use_is_told_before_a_model_is_loaded(capsys):
    with socket.socket() as used:
        used.bind(("127.0.0.1", 0))
        used.listen()
        port = str(used.getsockname()[1])
        with pytest.raises(SystemExit) as stopped:
            main(["demo", "--web", "--model", "no/model", "--port", port])
    assert stopped.value.code == 2
    told = capsys.readouterr().err
    assert f"nothing can be served at 127.0.0.1:{port}" in told and told.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--web", "--seed", "3"], "the page (--web) has no --seed"),
        (["--web", "--kinds", "count"], "the page (--web) has no --kinds"),
        (["--web", "--output", "demo"], "the page (--web) has no --output"),
        (["--web", "--set", "k0=1"], "the page (--web) has no --set"),
        (["--web", "--json"], "the page (--web) has no --json"),
        (["--web", "--budget", "16"], "the page takes a share"),
        (["--web", "--method", "magic"], "there is no method 'magic'"),
        (["--model", "a/b"], "without --web there is no --model"),
        (["--host", "127.0.0.1"], "without --web there is no --host"),
        (["--port", "7860"], "without --web there is no --port"),
    ],
)
def test_options_that_would_be_ignored_are_refused(words, said, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["demo", *words])
    assert stopped.value.code == 2
    told = capsys.readouterr().err
    assert said in told and told.count("\n") == 1


def test_answers_of_few_browsers_are_in_memory(monkeypatch):
    from autoprune.web import page as module

    given: dict[str, Any] = {}
    monkeypatch.setattr(module, "warm_up", lambda loaded: None)
    monkeypatch.setattr(module.gr.Blocks, "launch", lambda self, **options: given.update(options))
    module.launch(load_embedded("cpu", "float32"), "fastv", 50, "127.0.0.1", 7860)
    assert given["state_session_capacity"] == MOST_BROWSERS <= 64
