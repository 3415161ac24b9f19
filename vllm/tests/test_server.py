"""The console script starts vLLM's own OpenAI server; clients choose budgets, and bad ones disturb nobody."""

from __future__ import annotations

import base64
import io
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest
from equality import Ask, Reference

from autoprune import tiny
from autoprune_vllm.cli import main

OPTIONS = (
    "serve MODEL --method scope --budget 64 --option alpha=0.5 --budget-per-request "
    "--served-model-name tiny --dtype float32 --max-model-len 512 --enforce-eager --block-size 32 "
    "--num-gpu-blocks-override 64 --host 127.0.0.1 --disable-uvicorn-access-log"
)
TOKENS = 12


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    """A server in its own processes, as users start it."""
    port = free_port()
    words = OPTIONS.replace("MODEL", str(tiny.path())).split()
    log = tmp_path_factory.mktemp("server") / "log"
    with open(log, "wb") as output:
        server = subprocess.Popen(
            [sys.executable, "-m", "autoprune_vllm", *words, "--port", str(port)],
            env=os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"},
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        try:
            address = f"http://127.0.0.1:{port}"
            _wait(address, server, log)
            yield address
        finally:
            server.terminate()
            try:
                server.wait(30)
            except subprocess.TimeoutExpired:
                server.kill()


def _wait(address, server, log):
    until = time.monotonic() + 400
    while time.monotonic() < until:
        if server.poll() is not None:
            break
        try:
            urllib.request.urlopen(f"{address}/health", timeout=5)
            return
        except OSError:
            time.sleep(1)
    pytest.fail(f"the server did not start:\n{log.read_text(errors='replace')[-3000:]}")


def body(scene, question, **extra):
    """A chat request about a scene."""
    data = io.BytesIO()
    scene.image.save(data, "PNG")
    address = f"data:image/png;base64,{base64.b64encode(data.getvalue()).decode()}"
    content = [
        {"type": "image_url", "image_url": {"url": address}},
        {"type": "text", "text": question},
    ]
    messages = [{"role": "user", "content": content}]
    settings = {"model": "tiny", "temperature": 0, "max_tokens": TOKENS, "ignore_eos": True}
    return {**settings, "messages": messages, "return_token_ids": True, **extra}


def post(url, request):
    """Status and answer."""
    question = urllib.request.Request(
        f"{url}/v1/chat/completions",
        json.dumps(request).encode(),
        {"Content-Type": "application/json"},
    )
    try:
        with urllib.request.urlopen(question, timeout=60) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


@pytest.fixture(scope="module")
def scene():
    return tiny.draw_scene(seed=3)


@pytest.fixture(scope="module")
def asked(scene):
    return tiny.ask(scene, 0)[0].text


@pytest.mark.parametrize("given", [None, {"budget": 36}, {"budget": 144}, {"ratio": 0.25}], ids=str)
def test_each_request_spends_its_budget(url, scene, asked, given):
    extra = {} if given is None else {"mm_processor_kwargs": {"autoprune": given}}
    status, answer = post(url, body(scene, asked, **extra))
    assert status == 200, answer
    budget = {None: 64, "{'budget': 144}": 144}.get(given and str(given), 36)
    reference = Reference(tiny.path())
    ask = Ask(reference.text(asked), [scene.image], budget)
    text = len(reference.processor.tokenizer(ask.text, add_special_tokens=False).input_ids) - 1
    assert answer["usage"]["prompt_tokens"] == text + budget
    assert answer["choices"][0]["token_ids"] == reference.answer(ask, "scope", alpha=0.5)


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"budget": 0}, "whole number"),
        ({"budget": -1}, "whole number"),
        ({"budget": "x"}, "whole number"),
        ({"budget": 1.5}, "whole number"),
        ({"budget": True}, "whole number"),
        ({"budget": 145}, "more than the picture's 144"),
        ({"ratio": 0}, "ratio must be"),
        ({"ratio": 2}, "ratio must be"),
        ({"budget": 3, "ratio": 0.5}, "not both"),
        ({"keep": 3}, "no setting 'keep'"),
        ([36], "must be a table"),
        (36, "must be a table"),
    ],
    ids=str,
)
def test_a_bad_budget_is_400_with_one_sentence(url, scene, asked, given, why):
    status, answer = post(url, body(scene, asked, mm_processor_kwargs={"autoprune": given}))
    assert status == 400, answer
    assert why in answer["error"]["message"]
    status, _ = post(url, body(scene, asked))
    assert status == 200


def test_openai_python_gives_a_budget(url, scene, asked):
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    request = body(scene, asked)
    parts = client.chat.completions.create(
        model="tiny",
        messages=request["messages"],
        max_tokens=TOKENS,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"mm_processor_kwargs": {"autoprune": {"budget": 16}}},
    )
    *_, last = parts
    whole = client.chat.completions.create(
        model="tiny", messages=request["messages"], max_tokens=1, temperature=0
    )
    assert whole.usage.prompt_tokens - last.usage.prompt_tokens == 64 - 16


@pytest.mark.parametrize(
    ("words", "why"),
    [
        ("--method scop", "did you mean 'scope'"),
        ("--method fastv", "cannot prune a picture"),
        ("--budget 0", "budget must be a whole number"),
        ("--budget 3 --ratio 0.5", "not both"),
        ("--ratio 7", "ratio must be"),
        ("--option alpha", "NAME=VALUE"),
        ("--option alpha=2", "no option 'alpha'"),
        ("--hf-overrides [1]", "must be a JSON table"),
    ],
)
def test_the_console_script_refuses_in_one_sentence(words, why, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["serve", str(tiny.path()), *words.split()])
    assert stop.value.code == 2
    told = capsys.readouterr().err
    assert why in told and told.startswith("autoprune-vllm: ") and told.count("\n") == 1
