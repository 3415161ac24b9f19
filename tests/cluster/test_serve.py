"""`autoprune serve --engine ray`: the answers of one process, though replicas are killed; nothing is left."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from autoprune import AutoPrune, tiny
from autoprune.loading import Loaded, load_embedded, prepare
from tests.serving.conftest import JSON, Client, data_uri, wait_until

from .test_ray import descendants, is_ray, title

pytest.importorskip("ray.serve")

QUESTIONS = tuple(
    (budget, words)
    for budget in (12, 60, 144)
    for words in ("name everything", "is there an orange ring?", "how many objects are there?")
)
TOKENS = 24

Question = tuple[int, str]


@dataclass
class Server:
    process: subprocess.Popen[str]
    client: Client
    children: set[int] = field(default_factory=set)

    def replicas(self) -> set[int]:
        found = descendants(self.process.pid)
        self.children |= set(found)
        return {pid for pid in found if title(pid).startswith("ray::ServeReplica")}


@pytest.fixture(scope="module")
def loaded() -> Loaded:
    """The embedded model, which no longer ends an answer by itself."""
    loaded = load_embedded("cpu", "float32")
    loaded.model.generation_config.eos_token_id = None
    return loaded


@pytest.fixture(scope="module")
def picture() -> Image.Image:
    return tiny.draw_scene(3).image


@pytest.fixture(scope="module")
def expected(loaded: Loaded, picture: Image.Image) -> dict[Question, str]:
    """What `generate` answers to each question with its budget, without a server."""
    answers = {}
    for budget, words in QUESTIONS:
        inputs = prepare(loaded, picture, words)
        with torch.inference_mode(), AutoPrune(budget, first_cut="peek")(loaded.model):
            ids = loaded.model.generate(**inputs, max_new_tokens=TOKENS, do_sample=False)
        new = ids[0, inputs["input_ids"].shape[1] :]
        text = loaded.processor.tokenizer.decode(new, skip_special_tokens=True)
        answers[budget, words] = text.lstrip()
    assert len(set(answers.values())) > 5
    return answers


@pytest.fixture(scope="module")
def server(loaded: Loaded, picture: Image.Image, tmp_path_factory: Any) -> Any:
    folder = tmp_path_factory.mktemp("served")
    loaded.model.save_pretrained(folder)
    loaded.processor.save_pretrained(folder)
    command = [sys.executable, "-m", "autoprune", "serve", "--model", str(folder), "--port", "0"]
    command += [
        "--engine",
        "ray",
        "--replicas",
        "2",
        "--batch-size",
        "2",
        "--set",
        "first_cut=peek",
    ]
    environment = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0"}
    environment.pop("RAY_ADDRESS", None)
    # Of a group of its own, as a terminal would make it.
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True
    )
    assert process.stderr is not None
    lines = []
    for line in process.stderr:
        lines.append(line)
        if '"listening"' in line:
            break
    else:
        pytest.fail("".join(lines))
    threading.Thread(target=process.stderr.read, daemon=True).start()
    port = int(json.loads(lines[-1])["url"].split(":")[2].split("/")[0])
    started = Server(process, Client(port, data_uri(picture)))
    yield started
    started.replicas()
    process.kill()
    process.wait()
    for pid in started.children:
        if is_ray(pid):
            os.kill(pid, signal.SIGKILL)


@dataclass
class Outcome:
    """status: of the response; of a stream that ended with an error, that of the error's kind."""

    status: int
    retry_after: str | None
    text: str
    broke_off: bool = False


def ask(client: Client, question: Question, stream: bool, tokens: int = TOKENS) -> Outcome:
    budget, words = question
    fields = {"autoprune": {"budget": budget}, "max_tokens": tokens, "stream": stream}
    reply = client.ask(words, **fields)
    retry_after = reply.headers.get("retry-after")
    if reply.status != 200:
        assert reply.json["error"]["type"] == "server_error"
        return Outcome(reply.status, retry_after, reply.message)
    if not stream:
        return Outcome(200, None, reply.content)
    events = reply.body.decode().split("\n\n")
    assert events.pop() == ""
    last = events.pop().removeprefix("data: ")
    chunks = [json.loads(event.removeprefix("data: ")) for event in events]
    text = "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks)
    if last != "[DONE]":
        assert "ask again" in json.loads(last)["error"]["message"]
    return Outcome(200, None, text, last != "[DONE]")


def test_replicas_answer_as_one_process_does(server: Server, expected: dict[Question, str]) -> None:
    for question, text in expected.items():
        for stream in (False, True):
            assert ask(server.client, question, stream) == Outcome(200, None, text)
    usage = server.client.ask(autoprune={"budget": 30, "details": True}).json["usage"]["autoprune"]
    assert sum(usage["schedule"]) == 30 * 16 and usage["visual_tokens_per_layer"] == 30
    refused = server.client.ask(autoprune={"budget": 0.01})
    assert refused.status == 400 and "smallest is" in refused.message
    assert server.client.metric("autoprune_replicas") == 2
    assert len(server.replicas()) == 2


def test_a_killed_replica_costs_what_it_was_answering(
    server: Server, expected: dict[Question, str]
) -> None:
    outcomes: list[tuple[Question, Outcome]] = []
    ended = threading.Event()

    def load(number: int) -> None:
        while not ended.is_set():
            question = QUESTIONS[len(outcomes) % len(QUESTIONS)]
            outcomes.append((question, ask(server.client, question, number % 2 == 1)))

    threads = [threading.Thread(target=load, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    try:
        first = server.replicas()
        for killed in first:
            wait_until(lambda: server.client.metric("autoprune_running") >= 4, 60)
            os.kill(killed, signal.SIGKILL)
            # It comes back; when both of the first two are dead, only new ones can answer.
            wait_until(
                lambda gone=killed: gone not in (now := server.replicas()) and len(now) == 2, 120
            )
            known = len(outcomes)
            wait_until(lambda since=known: len(outcomes) >= since + 12, 120)
    finally:
        ended.set()
        for thread in threads:
            thread.join(120)
    assert not first & server.replicas()
    assert {outcome.status for _, outcome in outcomes} == {200, 503}
    lost = [each for _, each in outcomes if each.status == 503]
    assert all(each.retry_after == "1" and "ask again" in each.text for each in lost)
    broke_off = [each for _, each in outcomes if each.broke_off]
    # Two replicas, each killed with two answers running and two waiting at most.
    assert len(lost) + len(broke_off) <= 8
    for question, outcome in outcomes:
        if outcome.status == 200:
            whole = expected[question]
            assert outcome.text == whole or (outcome.broke_off and whole.startswith(outcome.text))


def test_a_client_that_leaves_frees_its_place(server: Server) -> None:
    """Of four long answers some are begun and some wait: all are given up."""
    client = server.client
    left = [client.connection() for _ in range(4)]
    try:
        for connection in left:
            body = json.dumps(client.body(max_tokens=1000, stream=True))
            connection.request("POST", "/v1/chat/completions", body, JSON)
        wait_until(lambda: client.metric("autoprune_running") >= 1, 60)
    finally:
        for connection in left:
            connection.close()
    wait_until(lambda: client.metric("autoprune_cancelled_total") == 4, 60)
    begun = time.monotonic()
    assert ask(client, QUESTIONS[0], False, 3).status == 200
    short = time.monotonic() - begun
    assert ask(client, QUESTIONS[0], False, 300).status == 200
    # It did not wait for the thousand tokens of those who left.
    assert short < time.monotonic() - begun - short


def test_nothing_is_left_after_ctrl_c(server: Server) -> None:
    server.replicas()
    os.killpg(server.process.pid, signal.SIGINT)
    server.process.wait(60)
    wait_until(lambda: not [pid for pid in server.children if is_ray(pid)])


def test_a_model_that_is_not_there_is_one_sentence(tmp_path: Path) -> None:
    words = ["serve", "--engine", "ray", "--model", str(tmp_path / "nothing")]
    command = [sys.executable, "-m", "autoprune", *words]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 2
    assert "autoprune: there is no model folder" in ended.stderr
    assert "Traceback" not in ended.stderr
