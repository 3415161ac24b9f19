"""Thousands of requests, good and bad, with clients that leave: is every answer the right one, is memory flat?

    python benchmarks/serving_soak.py --requests 10000

A few questions with different budgets are first asked one at a time. Then 8 clients ask them at random, whole
and streamed, between bad requests and requests that are left alone; every answer must be the one that was
given alone. Writes benchmarks/results/serving_soak.json: counts, and the server's memory over time.
"""

from __future__ import annotations

import json
import random
import socket
import threading
import time
from collections import Counter
from http.client import HTTPConnection
from pathlib import Path
from typing import Annotated, Any

import typer
from serving import Server, checkpoint, request

from autoprune.files import write_whole

RESULTS = Path(__file__).parent / "results" / "serving_soak.json"
SHARES = (0.1, 0.15, 0.25, 0.5, 1.0)
TOKENS = 8
JSON = {"Content-Type": "application/json"}
BAD: tuple[Any, ...] = (
    b"{",
    {"messages": []},
    {"messages": [{"role": "user", "content": "a"}], "max_tokens": True},
    {"messages": [{"role": "user", "content": "a <image> b"}]},
    {
        "messages": [
            {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://a/b"}}]}
        ]
    },
)
KINDS = ("whole", "streamed", "bad", "left", "left streaming")
WEIGHTS = (45, 25, 20, 5, 5)


def send(connection: HTTPConnection, body: Any) -> None:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    connection.request("POST", "/v1/chat/completions", data, JSON)


def whole(server: Server, body: dict[str, Any]) -> str:
    connection = server.connect()
    answer = server.ask(connection, body)
    connection.close()
    return str(answer["choices"][0]["message"]["content"])


def streamed(server: Server, body: dict[str, Any]) -> str:
    connection = server.connect()
    send(connection, {**body, "stream": True})
    lines = connection.getresponse().read().decode().split("\n\n")
    connection.close()
    if lines[-2:] != ["data: [DONE]", ""]:
        raise RuntimeError(f"the stream broke off: {lines[-2:]}")
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]
    return "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks)


def leave(server: Server, body: dict[str, Any], stream: bool, rng: random.Random) -> None:
    connection = server.connect()
    send(connection, {**body, "max_tokens": 500, "stream": stream})
    time.sleep(rng.random() * 0.3)
    if connection.sock is not None:
        connection.sock.shutdown(socket.SHUT_RDWR)
    connection.close()


class Load:
    """What the clients share."""

    def __init__(self, server: Server, requests: int) -> None:
        self.server, self.left = server, requests
        self.bodies = [request(i, share, TOKENS) for i, share in enumerate(SHARES)]
        self.expected = [whole(server, body) for body in self.bodies]
        self.counts: Counter[str] = Counter()
        self.lock = threading.Lock()

    def client(self, seed: int) -> None:
        rng = random.Random(seed)
        while True:
            with self.lock:
                if not self.left:
                    return
                self.left -= 1
            kind = rng.choices(KINDS, WEIGHTS)[0]
            try:
                outcome = self.once(kind, rng)
            except Exception as error:  # noted, and counted as wrong
                outcome = f"error: {type(error).__name__}: {error}"[:200]
            with self.lock:
                self.counts[f"{kind}: {outcome}"] += 1

    def once(self, kind: str, rng: random.Random) -> str:
        which = rng.randrange(len(self.bodies))
        if kind in ("whole", "streamed"):
            got = (whole if kind == "whole" else streamed)(self.server, self.bodies[which])
            return "right" if got == self.expected[which] else "WRONG"
        if kind == "bad":
            connection = self.server.connect()
            send(connection, rng.choice(BAD))
            answer = connection.getresponse()
            answer.read()
            connection.close()
            return "refused" if answer.status == 400 else f"status {answer.status}"
        leave(self.server, self.bodies[which], kind == "left streaming", rng)
        return "left"


def main(
    requests: int = 10_000,
    clients: int = 8,
    model: Annotated[Path | None, typer.Option(help="Folder of a checkpoint.")] = None,
    output: Path = RESULTS,
) -> None:
    """Ask, compare, and write what was seen."""
    with checkpoint(model) as folder:
        server = Server(folder, clients)
        try:
            load = Load(server, requests)
            threads = [threading.Thread(target=load.client, args=(i,)) for i in range(clients)]
            memory: list[tuple[int, float]] = []
            for thread in threads:
                thread.start()
            while any(thread.is_alive() for thread in threads):
                time.sleep(5)
                megabytes = server.metric("process_resident_memory_bytes") / 1e6
                memory.append((requests - load.left, round(megabytes, 1)))
            time.sleep(2)
            running = server.metric("autoprune_running") + server.metric("autoprune_queue_length")
            finished = server.metric('autoprune_requests_total{status="200"}')
        finally:
            server.end()
    record = {
        "requests": requests,
        "outcomes": dict(sorted(load.counts.items())),
        "answers that the server counted": finished - len(SHARES),
        "still running at the end": running,
        "megabytes after so many requests": memory[:: max(1, len(memory) // 40)],
    }
    print(json.dumps(record, indent=1))
    write_whole(output, json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
