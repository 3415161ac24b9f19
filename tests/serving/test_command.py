"""`autoprune serve` from the command line."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from autoprune import AutoPrune, Budget, cli
from autoprune.commands.serve import fitting, methods_of
from autoprune.loading import Loaded, load_model
from autoprune.methods import list_methods

from .conftest import LAYERS, Client, wait_until


def test_the_default_method_comes_first_and_others_share_its_budget():
    methods = methods_of("fastv", "1/4", ["layer=3"], ["divprune", "fastv"])
    assert list(methods) == ["fastv", "divprune"]
    assert methods["fastv"].layer == 3
    assert {method.budget for method in methods.values()} == {Budget.ratio(0.25)}


def test_all_methods_are_those_that_the_budget_and_the_model_allow(loaded: Loaded) -> None:
    assert list(methods_of("autoprune", "30", [], ["all"])) == list_methods()
    shares = methods_of("autoprune", "1/4", [], ["all"])
    assert set(list_methods()) - set(shares) == {"autoprune_reference"}
    impossible = {"a": AutoPrune(30, mi_layer=LAYERS), "b": AutoPrune(30)}
    assert list(fitting(impossible, loaded.model)) == ["b"]


def test_a_tuned_file_cannot_let_strangers_share_a_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    shared = AutoPrune(Budget.tokens(40, over="batch"))
    monkeypatch.setattr("autoprune.commands.serve.build_method", lambda *given: shared)
    with pytest.raises(ValueError, match="nothing to do with each other"):
        methods_of("tuned.json", None, [], [])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--budget", "16 over batch"], "an amount for each request"),
        (["--budget", "x"], "expected a number of tokens"),
        (["--method", "fastw"], "fastv"),
        (["--allow-methods", "fastw"], "fastv"),
        (["--set", "nothing=3"], "no option"),
        (["--window", "-1"], "0 to 10 seconds"),
        (["--api-key", " "], "the API key is empty"),
        (["--allow-folder", "/nowhere"], "no folder"),
        (["--model", "/nowhere"], "no model folder"),
        (["--batch-size", "0"], "batch-size"),
        (["--engine", "rey"], "engine must be one of local, ray"),
        (["--engine", "ray", "--replicas", "0"], "replicas"),
        (["--replicas", "2"], "--replicas are for --engine ray"),
        (["--engine", "ray", "--conversations", "2"], "--conversations need --engine local"),
        (["--engine", "ray", "--device", "cuda:1"], "Ray chooses the GPU of each replica"),
    ],
)
def test_bad_options_are_one_sentence(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["serve", *words])
    assert stop.value.code == 2
    told = capsys.readouterr().err
    assert said in told and "Traceback" not in told


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install 'autoprune\[serve\]'"):
        __import__("autoprune.commands.serve", fromlist=["x"]).check_installed()


def test_without_ray_its_extra_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(SystemExit):
        cli.main(["serve", "--engine", "ray"])
    assert "pip install 'autoprune[ray,serve]'" in capsys.readouterr().err


def test_shapes_are_known_without_weights(loaded: Loaded, tmp_path: Path) -> None:
    loaded.model.save_pretrained(tmp_path)
    loaded.processor.save_pretrained(tmp_path)
    whole = load_model(str(tmp_path), "cpu", "float32")
    outline = load_model(str(tmp_path), "cpu", "float32", weights=False)
    assert {each.device.type for each in outline.model.parameters()} == {"meta"}
    one, other = (AutoPrune(30)(each.model) for each in (whole, outline))
    assert one.shape == other.shape
    assert one.located.visual_ids == other.located.visual_ids


def test_it_serves_a_checkpoint_and_ends_when_it_is_told_to(
    loaded: Loaded, tmp_path: Path, uri: str
) -> None:
    """What is being answered is finished; a port that is taken is one sentence."""
    loaded.model.save_pretrained(tmp_path)
    loaded.processor.save_pretrained(tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "autoprune",
        "serve",
        "--model",
        str(tmp_path),
        "--budget",
        "40",
    ]
    command += ["--port", str(port), "--served-name", "mine"]
    server = subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"}
    )
    try:
        assert server.stderr is not None
        lines = [server.stderr.readline()]
        while '"listening"' not in lines[-1]:
            assert lines[-1], lines
            lines.append(server.stderr.readline())
        listening = json.loads(lines[-1])
        assert listening["url"] == f"http://127.0.0.1:{port}/v1"
        client = Client(port, uri)
        wait_until(lambda: answers(client))
        got: list[int] = []
        ask = threading.Thread(target=lambda: got.append(client.ask(max_tokens=60).status))
        ask.start()
        wait_until(lambda: client.metric("autoprune_running") == 1)
        server.send_signal(signal.SIGTERM)
        ask.join(60)
        assert got == [200]
        assert server.wait(30) in (0, -signal.SIGTERM)
    finally:
        server.kill()


def answers(client: Client) -> bool:
    try:
        return client.send("GET", "/health").status == 200
    except OSError:
        return False


def test_a_port_that_is_taken_is_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    from autoprune.serving.server import _socket

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=f"cannot listen on 127.0.0.1:{port}.*--port"):
            _socket("127.0.0.1", port)
    with pytest.raises(ValueError, match=r"cannot listen on nowhere\.invalid"):
        _socket("nowhere.invalid", 0)
