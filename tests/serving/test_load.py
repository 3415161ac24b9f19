"""`autoprune bench --serve`: figures of a server that runs."""

from __future__ import annotations

import json
import statistics
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from autoprune import AutoPrune, Budget, cli
from autoprune.commands.serve_client import Address, Lost
from autoprune.loading import Loaded
from autoprune.serving.service import Options, Service

from .conftest import LIMITS, VISUAL, Client

WORDS = (
    "bench",
    "--clients",
    "3",
    "--requests",
    "6",
    "--repeats",
    "2",
    "--max-tokens",
    "3",
    "--budgets",
    "1/2",
)


def bench(capsys: pytest.CaptureFixture[str], url: str, *more: str) -> dict[str, Any]:
    """The record of a run that succeeds."""
    with pytest.raises(SystemExit) as stop:
        cli.main([*WORDS, "--serve", url, "--json", *more])
    told = capsys.readouterr()
    assert stop.value.code == 0, told.err
    record: dict[str, Any] = json.loads(told.out)
    return record


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """The sentence of a run that fails."""
    with pytest.raises(SystemExit) as stop:
        cli.main(list(words))
    assert stop.value.code == 2
    told = capsys.readouterr().err
    assert "Traceback" not in told
    return " ".join(told.split())


def test_a_server_is_loaded_in_turns(
    client: Client, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    url, before = f"http://127.0.0.1:{client.port}", client.metric("autoprune_generated_tokens")
    output = tmp_path / "load.json"
    record = bench(capsys, f"{url}/v1/", "--budgets", "36,1/2", "--output", str(output))
    assert json.loads(output.read_text()) == record
    rows = record["rows"]
    # The first of the two takes the odd request, if there is one.
    assert rows["pruned"]["visual_tokens_per_layer"] == (36 + VISUAL / 2) / 2
    assert rows["plain"]["visual_tokens_per_layer"] == VISUAL
    assert rows["plain"]["flops_share"] == 1 > rows["pruned"]["flops_share"]
    for row in rows.values():
        assert row["answered"] == 12 and row["lost"] == [] and row["told_429"] == 0
        assert row["tokens_per_answer"] == 3
        for many, few in zip(
            row["tokens_per_second"]["all"], row["requests_per_second"]["all"], strict=True
        ):
            assert many == pytest.approx(3 * few)
        assert 0 < row["first_token_seconds"]["median"] <= row["request_seconds"]["median"]
        assert row["first_token_seconds"]["median"] <= row["first_token_seconds"]["p95"]
    ratios = [
        pruned / plain
        for pruned, plain in zip(
            *(rows[kind]["requests_per_second"]["all"] for kind in ("pruned", "plain")), strict=True
        )
    ]
    assert record["pruned_over_plain"]["requests_per_second"] == statistics.median(ratios)
    assert record["server"]["model"] == "small" and record["server"]["replicas"] == 0
    assert record["server"]["memory_bytes"] > 1e7
    # Two rounds of six, and three before them that are not counted; plain and pruned.
    after = client.metric("autoprune_generated_tokens")
    assert after - before == 3 * (2 * 2 * 6 + 2 * 3)


def test_the_table_fits_a_terminal(client: Client, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main([*WORDS, "--serve", f"http://127.0.0.1:{client.port}"])
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("plain") for line in lines)
    assert any(line.startswith("pruned: ") for line in lines)
    assert "server's memory: " in lines[-1] and "not known" not in lines[-1]
    assert max(map(len, lines)) <= 110


def test_what_is_told_429_comes_again_when_it_is_told(
    loaded: Loaded,
    start: Callable[[Service], Client],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A server with room for one, three clients."""
    limits = LIMITS.__class__(**{**vars(LIMITS), "queue": 1})
    methods = {"autoprune": AutoPrune(Budget.ratio(0.5))}
    small = start(Service(loaded, methods, Options(limits=limits)))
    monkeypatch.setattr("autoprune.commands.serve_client._seconds", lambda told: float(told) / 50)
    record = bench(capsys, f"http://127.0.0.1:{small.port}")
    rows = record["rows"].values()
    assert all(row["answered"] == 12 and not row["lost"] for row in rows)
    assert sum(row["told_429"] for row in rows) > 0


def test_a_key_is_shown(
    loaded: Loaded, start: Callable[[Service], Client], capsys: pytest.CaptureFixture[str]
) -> None:
    options = Options(limits=LIMITS, api_key="secret")
    locked = start(Service(loaded, {"autoprune": AutoPrune(40)}, options))
    url = f"http://127.0.0.1:{locked.port}"
    assert (
        "answers 401" in (told := refused(capsys, *WORDS, "--serve", url)) and "--api-key" in told
    )
    record = bench(capsys, url, "--api-key", "secret")
    assert record["rows"]["plain"]["answered"] == 12
    assert "secret" not in json.dumps(record)


def test_what_the_server_refuses_is_its_sentence(
    client: Client, capsys: pytest.CaptureFixture[str]
) -> None:
    url = f"http://127.0.0.1:{client.port}"
    told = refused(capsys, *WORDS, "--serve", url, "--budgets", "1")
    assert "answers 400" in told and "smallest is" in told


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--serve", "ftp://127.0.0.1"], "expects the address of a server"),
        (["--serve", "127.0.0.1:8000"], "expects the address of a server"),
        (["--serve", "file:///etc/passwd"], "expects the address of a server"),
        (["--serve", "http://127.0.0.1:99999"], "expects the address of a server"),
        (["--serve", "http://127.0.0.1:1"], "no server answers at http://127.0.0.1:1"),
        (["--serve", "http://127.0.0.1:1", "--method", "fastv"], "--method: not with --serve"),
        (["--serve", "http://127.0.0.1:1", "--batch", "4"], "--batch: not with --serve"),
        (["--serve", "http://127.0.0.1:1", "--budgets", "x"], "expected a number of tokens"),
        (["--serve", "http://127.0.0.1:1", "--budgets", "9 over batch"], "a budget of its own"),
        (["--serve", "http://127.0.0.1:1", "--budgets", ","], "--budgets expects one or more"),
        (["--serve", "http://127.0.0.1:1", "--question", " "], "the question is empty"),
        (["--serve", "http://127.0.0.1:1", "--image", "/nowhere.png"], "/nowhere.png"),
        (["--serve", "http://127.0.0.1:1", "--api-key", "a\nb"], "no header can have"),
        (["--clients", "4"], "--clients: only with --serve"),
        (["--max-tokens", "4", "--requests", "2"], "only with --serve"),
    ],
)
def test_bad_input_is_one_sentence(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert said in refused(capsys, "bench", *words)


Answer = tuple[int, bytes]


@contextmanager
def other_server(answers: dict[str, Answer]) -> Iterator[str]:
    """A server that is none of ours: the same answer to every request for a path."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            status, body = answers.get(self.path, (404, b"?"))
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_POST = do_GET

        def log_message(self, *given: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


OURS = json.dumps({"data": [{"id": "m", "autoprune": {"methods": {}}}]}).encode()


@pytest.mark.parametrize(
    "models", [(404, b"no"), (200, b"<html>"), (200, b'{"data": [{"id": "gpt"}]}'), (302, b"")]
)
def test_a_server_of_another_kind_is_named(
    models: Answer, capsys: pytest.CaptureFixture[str]
) -> None:
    with other_server({"/v1/models": models}) as url:
        told = refused(capsys, *WORDS, "--serve", url)
    assert f"the server at {url} is none of autoprune (its /v1/models answers {models[0]})" in told


def test_a_server_that_answers_nothing_is_said_to(capsys: pytest.CaptureFixture[str]) -> None:
    broken = (503, b'{"error": {"message": "all replicas are gone"}}')
    answers = {"/v1/models": (200, OURS), "/v1/chat/completions": broken}
    with other_server(answers) as url:
        told = refused(capsys, *WORDS, "--serve", url)
    assert "no request of a round was answered" in told and "all replicas are gone" in told


@pytest.mark.parametrize(
    "stream",
    [
        b"",
        b'data: {"choices": [{"delta": {"content": "a"}}]}\n\n',
        b'data: {"error": {"message": "the replica has ended"}}\n\n',
    ],
)
def test_a_stream_that_breaks_off_is_lost(stream: bytes) -> None:
    with other_server({"/v1/chat/completions": (200, stream)}) as url:
        address = Address(url)
        connection = address.connect()
        with pytest.raises(Lost, match="broke off"):
            address.ask(connection, {}, threading.Event())
        connection.close()
