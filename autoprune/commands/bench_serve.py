"""`autoprune bench --serve`: what a running server does under load, with pruning and without."""

from __future__ import annotations

import base64
import io
import json
import os
import platform
import statistics
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from datetime import date
from http.client import HTTPConnection
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from rich.console import Console

from .. import __version__
from ..files import check_file, make_folder, write_whole
from ..images import load_image
from ..serving.answers import budget_record
from .bench import Request
from .bench_serve_table import show
from .inputs import parse_budget
from .report import print_json
from .serve_client import Address, Answered, Lost

PLAIN, PRUNED = "plain", "pruned"
_SIZE = 336
"""Pixels of the pictures that are made, in each direction."""


@dataclass(frozen=True)
class Load:
    """What to ask, and how to show what came of it.

    Attributes:
        requests: in each round, plain and pruned each.
        budgets: by commas; the pruned requests take turns.
        rounds: in each, one load is plain and one is pruned; who is first takes turns.
        image: a file, or None for random pixels, others in each request.
    """

    url: str
    clients: int = 8
    requests: int = 32
    budgets: str = "1/9,2/9,4/9"
    max_tokens: int = 32
    rounds: int = 3
    api_key: str | None = None
    image: str | None = None
    question: str = "What is in this picture?"
    output: Path | None = None
    as_json: bool = False


def load_of(
    url: str, request: Request, amounts: Mapping[str, int | None], api_key: str | None
) -> Load:
    """The load in the options of `autoprune bench`.

    Raises:
        ValueError: options among them are for a model of this process.
    """
    known = {"budget", "repeats", "image", "question", "output", "as_json"}
    given = [
        f"--{field.name.replace('_', '-')}"
        for field in fields(request)
        if field.name not in known and getattr(request, field.name) != field.default
    ]
    if given:
        raise ValueError(
            f"{', '.join(given)}: not with --serve, where the server chooses; leave it out"
        )
    if request.question is not None and not request.question.strip():
        raise ValueError("the question is empty")
    stated = {
        **amounts,
        "budgets": request.budget,
        "rounds": request.repeats,
        "question": request.question,
    }
    return Load(
        url,
        api_key=api_key,
        image=request.image,
        output=request.output,
        as_json=request.as_json,
        **{name: value for name, value in stated.items() if value is not None},  # type: ignore[arg-type]
    )


def bench_serve(load: Load, console: Console) -> None:
    """Ask, and show.

    Raises:
        ValueError: bad input, no server of autoprune there, or one that refuses the requests or answers none.
    """
    address, budgets = Address(load.url, load.api_key), _budgets(load.budgets)
    picture = None if load.image is None else load_image(load.image)
    output = None if load.output is None else _output(load.output)
    model = address.model()
    numbers = count()
    rounds = list(
        _rounds(load, address, {PLAIN: [{"ratio": 1.0}], PRUNED: budgets}, picture, numbers)
    )
    record = _record(load, model, rounds, address.metrics())
    if output is not None:
        write_whole(output, json.dumps(record, indent=1) + "\n")
    if load.as_json:
        print_json(console, record)
    else:
        show(record, console)


@dataclass
class Outcome:
    """What came of one load."""

    seconds: float
    answers: list[Answered]
    lost: list[str]


def _rounds(
    load: Load,
    address: Address,
    kinds: dict[str, list[dict[str, Any]]],
    picture: Image.Image | None,
    numbers: Iterator[int],
) -> Iterator[dict[str, Outcome]]:
    """The loads of each round; before them, some requests of each kind that are not counted."""

    def once(kind: str, requests: int) -> Outcome:
        turns = kinds[kind]
        bodies = [
            _body(load, turns[i % len(turns)], picture, next(numbers)) for i in range(requests)
        ]
        return _ask_all(address, bodies, load.clients)

    for kind in kinds:
        once(kind, max(load.clients, len(kinds[kind])))
    for number in range(load.rounds):
        order = list(kinds) if number % 2 == 0 else list(kinds)[::-1]
        outcomes = {kind: once(kind, load.requests) for kind in order}
        for outcome in outcomes.values():
            if not outcome.answers:
                raise ValueError(f"no request of a round was answered: {outcome.lost[-1]}")
        yield outcomes


def _ask_all(address: Address, bodies: Sequence[dict[str, Any]], clients: int) -> Outcome:
    """All requests by so many clients, each on a connection of its own."""
    ended, answers, lost = threading.Event(), list[Answered](), list[str]()
    left = iter(bodies)
    lock = threading.Lock()

    def one_client() -> None:
        connection: HTTPConnection = address.connect()
        try:
            while not ended.is_set():
                with lock:
                    body = next(left, None)
                if body is None:
                    return
                try:
                    answers.append(address.ask(connection, body, ended))
                except Lost as error:
                    lost.append(str(error))
                    connection.close()
        except BaseException:
            ended.set()
            raise
        finally:
            connection.close()

    begun = time.monotonic()
    with ThreadPoolExecutor(clients) as pool:
        working = [pool.submit(one_client) for _ in range(clients)]
        try:
            for each in working:
                each.result()
        finally:
            ended.set()
    return Outcome(time.monotonic() - begun, answers, lost)


def _body(
    load: Load, budget: dict[str, Any], picture: Image.Image | None, number: int
) -> dict[str, Any]:
    """The request of a number."""
    if picture is None:
        blocks = np.random.default_rng(number).integers(0, 256, (12, 12, 3), np.uint8)
        picture = Image.fromarray(blocks).resize((_SIZE, _SIZE), Image.Resampling.NEAREST)
    file = io.BytesIO()
    picture.convert("RGB").save(file, "PNG")
    uri = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
    content = [
        {"type": "image_url", "image_url": {"url": uri}},
        {"type": "text", "text": load.question},
    ]
    return {
        "messages": [{"role": "user", "content": content}],
        "max_tokens": load.max_tokens,
        "stream": True,
        "stream_options": {"include_usage": True},
        "autoprune": budget,
    }


def _budgets(text: str) -> list[dict[str, Any]]:
    """As requests state them."""
    budgets = [parse_budget(part.strip()) for part in text.split(",") if part.strip()]
    if not budgets:
        raise ValueError(f"--budgets expects one or more by commas, such as 1/9,64, got {text!r}")
    if any(budget.over != "prompt" for budget in budgets):
        raise ValueError('a request has a budget of its own; give --budgets without "over batch"')
    return [budget_record(budget) for budget in budgets]


def _output(path: Path) -> Path:
    file = path if path.suffix.lower() == ".json" else make_folder(path) / "bench_serve.json"
    check_file(file)
    return file


def _record(
    load: Load,
    model: dict[str, Any],
    rounds: Sequence[dict[str, Outcome]],
    metrics: dict[str, float],
) -> dict[str, Any]:
    rows = {kind: _row([outcomes[kind] for outcomes in rounds]) for kind in (PLAIN, PRUNED)}
    faster = {
        key: [
            pruned / plain
            for pruned, plain in zip(*(rows[k][key]["all"] for k in (PRUNED, PLAIN)), strict=True)
        ]
        for key in ("requests_per_second", "tokens_per_second")
    }
    replicas = metrics.get("autoprune_replicas", 0)
    return {
        "date": date.today().isoformat(),
        "server": {
            "model": model["id"],
            **model["autoprune"],
            "replicas": int(replicas),
            "memory_bytes": metrics.get("process_resident_memory_bytes"),
            "memory_is_of": "HTTP process alone" if replicas else "whole server",
        },
        "client": {
            "autoprune": __version__,
            "python": platform.python_version(),
            "machine": platform.machine(),
            "cores": os.cpu_count(),
        },
        "clients": load.clients,
        "requests": load.requests,
        "budgets": load.budgets,
        "max_tokens": load.max_tokens,
        "rounds": load.rounds,
        "rows": rows,
        "pruned_over_plain": {key: statistics.median(values) for key, values in faster.items()},
    }


def _row(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Figures of one kind of load, over the rounds."""
    answers = [answer for outcome in outcomes for answer in outcome.answers]
    pruning = [answer.usage["autoprune"] for answer in answers]

    def rate(amounts: Sequence[float]) -> dict[str, Any]:
        rates = [
            amount / outcome.seconds for amount, outcome in zip(amounts, outcomes, strict=True)
        ]
        return {"median": statistics.median(rates), "all": rates}

    return {
        "requests_per_second": rate([len(outcome.answers) for outcome in outcomes]),
        "tokens_per_second": rate([sum(a.tokens for a in each.answers) for each in outcomes]),
        "first_token_seconds": _spread([answer.first_seconds for answer in answers]),
        "request_seconds": _spread([answer.seconds for answer in answers]),
        "tokens_per_answer": statistics.mean(answer.tokens for answer in answers),
        "visual_tokens_per_layer": statistics.mean(
            each["visual_tokens_per_layer"] for each in pruning
        ),
        "flops_share": statistics.mean(each["flops_share"] for each in pruning),
        "answered": len(answers),
        "told_429": sum(answer.retries for answer in answers),
        "lost": [why for outcome in outcomes for why in outcome.lost],
    }


def _spread(seconds: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(seconds), "p95": float(np.percentile(seconds, 95))}
