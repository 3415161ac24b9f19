"""What batching brings to a server, and what the server costs beside a bare loop of `generate`.

    python benchmarks/serving.py
    python benchmarks/serving.py --rounds 5 --budget 1/9 --model FOLDER

* `batch 1` and `batch 8`: requests per second of 8 clients, answered one by one and up to 8 together. Every
  round asks both servers, one after the other. Budgets are mixed: half, one, two and four times `--budget`.
* `prefill`: answers of one token by a random LLaVA of 36 M parameters with 576 visual tokens, pruned to
  `--budget` and whole, in turns.
* `bare loop` and `one client`: the same requests, one after the other, by `model.generate` in this process and
  through the server. In turns, request by request; the median of the pairs is the overhead.

The default model is of the embedded one's architecture with random weights, which does not end its answers
early. Writes benchmarks/results/serving.json.
"""

from __future__ import annotations

import base64
import io
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.client import HTTPConnection
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers
import typer
from transformers import LlavaForConditionalGeneration

import autoprune
from autoprune import AutoPrune, tiny
from autoprune.commands.inputs import parse_budget
from autoprune.files import write_whole
from autoprune.loading import load_model, prepare
from autoprune.tiny.recipe.architecture import build_model, llava_config
from autoprune.tiny.recipe.chat import make_processor

RESULTS = Path(__file__).parent / "results" / "serving.json"
QUESTION = "is there an orange ring?"
SHARES = (0.5, 1.0, 2.0, 4.0)
"""Budgets of the mixed load, as multiples of the one that was asked for."""


class Server:
    """`autoprune serve` in a process of its own."""

    def __init__(self, model: Path, batch_size: int) -> None:
        self.batch_size = batch_size
        command = [sys.executable, "-m", "autoprune", "serve", "--model", str(model), "--port", "0"]
        command += ["--batch-size", str(batch_size), "--set", "first_cut=peek"]
        self._process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        assert self._process.stderr is not None
        for line in self._process.stderr:
            if '"listening"' in line:
                break
        else:
            raise RuntimeError("the server did not start")
        self.port = int(json.loads(line)["url"].split(":")[2].split("/")[0])
        # Its log must be read, or it waits for somebody to do so.
        threading.Thread(target=self._process.stderr.read, daemon=True).start()

    def ask(self, connection: HTTPConnection, body: dict[str, Any]) -> dict[str, Any]:
        headers = {"Content-Type": "application/json"}
        connection.request("POST", "/v1/chat/completions", json.dumps(body), headers)
        answer = connection.getresponse()
        record: dict[str, Any] = json.loads(answer.read())
        if answer.status != 200:
            raise RuntimeError(record["error"]["message"])
        return record

    def connect(self) -> HTTPConnection:
        return HTTPConnection("127.0.0.1", self.port, timeout=600)

    def cpu_seconds(self) -> float:
        return self.metric("process_cpu_seconds_total")

    def metric(self, name: str) -> float:
        connection = self.connect()
        connection.request("GET", "/metrics")
        text = connection.getresponse().read().decode()
        connection.close()
        lines = [line for line in text.splitlines() if line.startswith(f"{name} ")]
        return sum(float(line.rpartition(" ")[2]) for line in lines)

    def end(self) -> None:
        self._process.terminate()
        self._process.wait(60)


@contextmanager
def checkpoint(folder: Path | None, wide: bool = False) -> Iterator[Path]:
    """The folder, or one with a model that answers at length; see `wide_model`."""
    if folder is not None:
        yield folder
        return
    torch.manual_seed(0)
    processor = make_processor()
    model = wide_model(processor) if wide else build_model(processor.tokenizer)
    with tempfile.TemporaryDirectory() as made:
        model.save_pretrained(made)
        processor.save_pretrained(made)
        yield Path(made)


def wide_model(processor: Any) -> LlavaForConditionalGeneration:
    """A LLaVA of 36 M parameters with 576 visual tokens, whose decoder costs far more than its tower."""
    config = llava_config(processor.tokenizer, layers=12, vision_layers=3)
    text, vision = config.text_config, config.vision_config
    text.hidden_size, text.intermediate_size = 512, 1280
    text.num_attention_heads, text.num_key_value_heads, text.head_dim = 8, 8, 64
    vision.image_size, config.image_seq_length = 192, 576
    size = {"height": 192, "width": 192}
    processor.image_processor.size = processor.image_processor.crop_size = size
    return LlavaForConditionalGeneration(config)


def request(seed: int, budget: float, tokens: int) -> dict[str, Any]:
    """A question about a picture of its own."""
    file = io.BytesIO()
    tiny.draw_scene(seed).image.save(file, "PNG")
    uri = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
    content = [
        {"type": "image_url", "image_url": {"url": uri}},
        {"type": "text", "text": QUESTION},
    ]
    messages = [{"role": "user", "content": content}]
    return {"messages": messages, "max_tokens": tokens, "autoprune": {"ratio": budget}}


def load(server: Server, bodies: list[dict[str, Any]], clients: int) -> dict[str, float]:
    """All requests by so many clients at a time."""

    def one_client(own: list[dict[str, Any]]) -> list[int]:
        connection = server.connect()
        tokens = [server.ask(connection, b)["usage"]["completion_tokens"] for b in own]
        connection.close()
        return tokens

    spent, begun = server.cpu_seconds(), time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        counts = list(pool.map(one_client, [bodies[i::clients] for i in range(clients)]))
    seconds = time.perf_counter() - begun
    tokens = [count for own in counts for count in own]
    return {
        "requests per second": len(bodies) / seconds,
        "CPU seconds per request": (server.cpu_seconds() - spent) / len(bodies),
        "tokens per answer": statistics.mean(tokens),
    }


def batches(
    servers: list[Server], share: float, requests: int, clients: int, tokens: int, rounds: int
) -> dict[str, Any]:
    """Requests per second of servers with different batch sizes, in turns."""
    bodies = [
        request(i, min(1.0, share * SHARES[i % len(SHARES)]), tokens) for i in range(requests)
    ]
    for server in servers:  # warm
        load(server, bodies[: 2 * clients], clients)
    rows = [
        {f"batch {server.batch_size}": load(server, bodies, clients) for server in servers}
        for _ in range(rounds)
    ]
    alone, together = rows[0]
    return {"rounds": rows, f"{together} over {alone}": ratios(rows, together, alone)}


def ratios(rows: list[dict[str, Any]], more: str, less: str) -> dict[str, float]:
    """The median over rounds of what one does of the other."""
    return {
        key: statistics.median(row[more][key] / row[less][key] for row in rows)
        for key in ("requests per second", "CPU seconds per request")
    }


def prefill(share: float, requests: int, clients: int, rounds: int) -> dict[str, Any]:
    """Requests per second with answers of one token, pruned and whole, by one server in turns."""
    loads = {
        name: [request(i, budget, 1) for i in range(requests)]
        for name, budget in (("pruned", share), ("whole", 1.0))
    }
    with checkpoint(None, wide=True) as folder:
        server = Server(folder, clients)
        try:
            for bodies in loads.values():  # warm
                load(server, bodies[:clients], clients)
            rows = [
                {name: load(server, bodies, clients) for name, bodies in loads.items()}
                for _ in range(rounds)
            ]
        finally:
            server.end()
    return {"rounds": rows, "pruned over whole": ratios(rows, "pruned", "whole")}


def overhead(
    server: Server, folder: Path, share: float, tokens: int, requests: int
) -> dict[str, float]:
    """Seconds of a request by the server and by a bare loop, in turns."""
    loaded = load_model(str(folder))
    budget = autoprune.Budget.ratio(share)
    method = AutoPrune(budget, first_cut="peek")
    connection, pairs = server.connect(), []
    served_cpu, bare_cpu = [], []
    for seed in range(requests + 1):
        body, image = request(seed, share, tokens), tiny.draw_scene(seed).image
        cpu, begun = server.cpu_seconds(), time.perf_counter()
        server.ask(connection, body)
        served = time.perf_counter()
        served_cpu.append(server.cpu_seconds() - cpu)
        own, bare = time.process_time(), time.perf_counter()
        inputs = prepare(loaded, image, QUESTION)
        with torch.inference_mode(), method(loaded.model):
            ids = loaded.model.generate(**inputs, max_new_tokens=tokens, do_sample=False)
        loaded.processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :])
        pairs.append((served - begun, time.perf_counter() - bare))
        bare_cpu.append(time.process_time() - own)
    # The first one loads what the others find ready.
    shares = [server_seconds / bare for server_seconds, bare in pairs[1:]]
    return {
        "server seconds": statistics.median(pair[0] for pair in pairs[1:]),
        "bare seconds": statistics.median(pair[1] for pair in pairs[1:]),
        "median of server / bare": statistics.median(shares),
        "CPU of server / bare": sum(served_cpu[1:]) / sum(bare_cpu[1:]),
    }


def main(
    model: Annotated[Path | None, typer.Option(help="Folder of a checkpoint.")] = None,
    budget: Annotated[str, typer.Option(help="Share of the visual tokens.")] = "1/9",
    rounds: int = 3,
    clients: int = 8,
    requests: Annotated[int, typer.Option(help="In each round, at each server.")] = 32,
    tokens: Annotated[int, typer.Option(help="Longest answer.")] = 32,
    output: Path = RESULTS,
) -> None:
    """Measure, print and write the table."""
    share = parse_budget(budget).value
    record: dict[str, Any] = {
        "versions": {
            "autoprune": autoprune.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "clients": clients,
        "requests": requests,
        "max_tokens": tokens,
        "budget": budget,
    }

    def note(**rows: Any) -> None:
        """Write down what is known; the next part may take long."""
        record.update(rows)
        write_whole(output, json.dumps(record, indent=1) + "\n")

    with checkpoint(model) as folder:
        servers = [Server(folder, size) for size in (1, clients)]
        try:
            note(batches=batches(servers, share, requests, clients, tokens, rounds))
            note(one_client=overhead(servers[1], folder, share, tokens, requests))
        finally:
            for server in servers:
                server.end()
    note(prefill_of_576_visual_tokens=prefill(share, requests, clients, rounds))
    print(json.dumps(record, indent=1))


if __name__ == "__main__":
    typer.run(main)
