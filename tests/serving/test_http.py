"""The server on a port: what clients see of it."""

from __future__ import annotations

import json
import logging
import re
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import openai
import pytest
from PIL import Image

from autoprune import AutoPrune
from autoprune.loading import Loaded
from autoprune.serving.logs import JsonLines
from autoprune.serving.service import Options, Service

from .conftest import BUDGET, JSON, LAYERS, LIMITS, VISUAL, Client, wait_until

Start = Callable[[Service], Client]


@pytest.fixture(scope="module")
def api(client: Client) -> openai.OpenAI:
    url = f"http://127.0.0.1:{client.port}/v1"
    return openai.OpenAI(base_url=url, api_key="none", max_retries=0)


def test_openai_asks_with_a_budget(api: openai.OpenAI, client: Client) -> None:
    body = client.body()
    answer = api.chat.completions.create(
        model="small",
        messages=body["messages"],
        max_completion_tokens=4,
        extra_body={"autoprune": {"budget": 30, "details": True}},
    )
    assert answer.choices[0].finish_reason == "length"
    assert answer.choices[0].message.content
    assert answer.usage is not None and answer.usage.completion_tokens == 4
    assert answer.usage.prompt_tokens > VISUAL
    pruned = (answer.usage.model_extra or {})["autoprune"]
    assert pruned["budget"] == {"budget": 30}
    assert pruned["visual_tokens"] == VISUAL
    assert pruned["visual_tokens_per_layer"] == 30
    assert sum(pruned["schedule"]) == 30 * LAYERS
    assert pruned["flops_share"] == pytest.approx(
        pruned["flops"] / pruned["flops_unpruned"], abs=1e-6
    )
    assert pruned["information_bits"] >= 0


def test_openai_streams_what_it_answers_whole(api: openai.OpenAI, client: Client) -> None:
    body = client.body(words := "name everything")
    chunks = list(
        api.chat.completions.create(
            model="small",
            messages=body["messages"],
            max_tokens=6,
            stream=True,
            stream_options={"include_usage": True},
            logprobs=True,
        )
    )
    deltas = [chunk.choices[0].delta.content for chunk in chunks if chunk.choices]
    whole = client.ask(words, max_tokens=6)
    assert "".join(filter(None, deltas)) == whole.content
    assert sum(bool(text) for text in deltas) > 1
    usage = chunks[-1].usage
    assert usage is not None and usage.completion_tokens == 6
    assert (usage.model_extra or {})["autoprune"]["visual_tokens_per_layer"] == BUDGET
    told = [chunk.choices[0].logprobs for chunk in chunks if chunk.choices]
    assert sum(len(part.content or ()) for part in told if part is not None) == 6
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "length"


def test_the_example_of_the_page_runs(
    client: Client, scene: Image.Image, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    page = (Path(__file__).parents[2] / "docs" / "serving.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    scene.save(tmp_path / "picture.png")
    monkeypatch.chdir(tmp_path)
    code = code.replace(":8000/", f":{client.port}/").replace("max_tokens=64", "max_tokens=4")
    exec(compile(code, "serving.md", "exec"), {})
    assert "'visual_tokens_per_layer': 36.0" in capsys.readouterr().out


def test_openai_raises_its_own_errors(api: openai.OpenAI, client: Client) -> None:
    messages = client.body()["messages"]
    with pytest.raises(openai.BadRequestError, match="smallest is"):
        api.chat.completions.create(
            model="small", messages=messages, extra_body={"autoprune": {"budget": 1}}
        )
    with pytest.raises(openai.NotFoundError, match="no model"):
        api.chat.completions.create(model="large", messages=messages)
    assert [model.id for model in api.models.list()] == ["small"]
    assert api.models.retrieve("small").id == "small"


def test_clients_at_the_same_time_get_their_own_answers(client: Client) -> None:
    asked = [({"budget": 30 + 10 * i}, f"what is at {i}?") for i in range(6)]
    alone = [client.ask(words, autoprune=pruning) for pruning, words in asked]
    with ThreadPoolExecutor(6) as pool:
        together = list(
            pool.map(
                lambda each: client.ask(each[1], autoprune={**each[0], "details": True}), asked
            )
        )
    assert [reply.content for reply in together] == [reply.content for reply in alone]
    spent = [reply.json["usage"]["autoprune"] for reply in together]
    assert [one["visual_tokens_per_layer"] for one in spent] == [30, 40, 50, 60, 70, 80]
    assert max(one["batch_size"] for one in spent) > 1


def test_a_conversation_goes_on(client: Client) -> None:
    messages = client.body()["messages"]
    messages += [
        {"role": "assistant", "content": "a ring"},
        {"role": "user", "content": "and which colour?"},
    ]
    reply = client.post({"messages": [{"role": "system", "content": "be brief"}, *messages]})
    assert reply.status == 200
    assert reply.json["usage"]["prompt_tokens"] > VISUAL + 10


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_the_model(client: Client, stream: bool) -> None:
    left = client.metric("autoprune_cancelled_total")
    connection = client.connection()
    body = client.body(max_tokens=LIMITS.max_tokens, stream=stream)
    connection.request("POST", "/v1/chat/completions", json.dumps(body), JSON)
    wait_until(lambda: client.metric("autoprune_running") == 1)
    connection.sock.close()
    connection.close()
    wait_until(lambda: client.metric("autoprune_running") == 0, 10)
    assert client.metric("autoprune_cancelled_total") == left + 1
    assert client.metric('autoprune_requests_total{status="499"}') == left + 1


def test_metrics_count_what_was_spent_and_saved(client: Client) -> None:
    names = ("layer_tokens_spent", "layer_tokens_saved", "visual_tokens", "generated_tokens")
    read = lambda: [client.metric(f"autoprune_{name}_total") for name in names]  # noqa: E731
    before = read()
    client.ask(autoprune={"budget": 30}, max_tokens=2)
    wait_until(lambda: read() != before)
    spent, saved, visual, tokens = (b - a for a, b in zip(before, read(), strict=True))
    assert (spent, saved) == (30 * LAYERS, (VISUAL - 30) * LAYERS)
    assert (visual, tokens) == (VISUAL, 2)
    assert client.metric("autoprune_batch_size_count") > 0
    assert client.send("GET", "/health").json == {"status": "ok"}


@pytest.fixture(scope="module")
def small(loaded: Loaded, start: Start) -> Client:
    """A server with a key, where two requests fill it."""
    limits = replace(LIMITS, queue=2, seconds=3)
    options = Options(name="mine", api_key="secret", limits=limits)
    return start(Service(loaded, {"autoprune": AutoPrune(BUDGET)}, options))


KEY = {"Authorization": "Bearer secret"}


def test_a_key_is_asked_for(small: Client) -> None:
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "secret"}):
        for verb, path in (
            ("POST", "/v1/chat/completions"),
            ("GET", "/v1/models"),
            ("GET", "/metrics"),
        ):
            reply = small.send(verb, path, None, headers)
            assert reply.status == 401
            assert "API key" in reply.message
    assert small.send("GET", "/v1/models", None, KEY).json["data"][0]["id"] == "mine"
    assert small.send("GET", "/health").status == 200


def test_a_full_server_says_when_to_come_again(small: Client) -> None:
    waiting: list[Any] = []
    for _ in range(2):
        connection = small.connection()
        connection.putrequest("POST", "/v1/chat/completions")
        connection.putheader("Authorization", "Bearer secret")
        connection.putheader("Content-Type", "application/json")
        connection.putheader("Content-Length", "100")
        connection.endheaders(b"{")
        waiting.append(connection)
    time.sleep(0.3)
    reply = small.post(small.body(), KEY)
    assert reply.status == 429
    assert "2 requests are waiting" in reply.message
    assert int(reply.headers["retry-after"]) >= 1
    for connection in waiting:
        connection.close()
    wait_until(lambda: small.post(small.body(), KEY).status == 200)


def test_an_answer_that_takes_too_long_is_given_up(
    loaded: Loaded, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = Service(
        loaded, {"autoprune": AutoPrune(BUDGET)}, Options(limits=replace(LIMITS, seconds=1))
    )
    hold = threading.Event()
    monkeypatch.setattr(slow.engine, "_answer", lambda jobs: hold.wait(30))
    client = start(slow)
    reply = client.ask()
    assert reply.status == 504
    assert "longer than 1 seconds" in reply.message
    hold.set()


def test_an_error_of_the_servers_own_is_told_and_the_next_request_answered(
    loaded: Loaded, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = Service(loaded, {"autoprune": AutoPrune(BUDGET)}, Options(limits=LIMITS))
    client = start(service)

    def fail(*_: object) -> None:
        raise RuntimeError("the words of a request")

    with monkeypatch.context() as broken:
        broken.setattr("autoprune.serving.engine.generate", fail)
        whole, streamed = client.ask(), client.ask(stream=True)
    for reply in (whole, streamed):
        assert reply.status == 500
        assert reply.message == "the model failed on this request; the server goes on"
    assert client.ask().status == 200


def test_the_log_has_numbers_and_no_words(client: Client, caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("autoprune")
    logger.addHandler(caplog.handler)
    caplog.set_level("INFO", "autoprune")
    try:
        client.ask("a very private question")
        wait_until(lambda: caplog.records)
    finally:
        logger.removeHandler(caplog.handler)
    line = JsonLines().format(caplog.records[-1])
    record = json.loads(line)
    assert record["status"] == 200 and record["tokens"] == 3
    assert record["visual_tokens_per_layer"] == BUDGET
    assert record["first_token_seconds"] <= record["seconds"]
    assert "private" not in line


def test_another_name_than_this_machines_own_needs_a_key(client: Client) -> None:
    """A site whose name is led to 127.0.0.1 gets nothing."""
    for name, status in (("evil.example", 403), ("localhost", 200), ("127.0.0.1", 200)):
        answer = client.send("GET", "/v1/models", headers={"Host": f"{name}:{client.port}"})
        assert answer.status == status
