"""Time of one decoding step on a long prompt: the plain model, and pruned on caches of three kinds.

    python benchmarks/decode.py

A small LLaVA (12 layers, width 512, random weights) with five pictures, 2880 visual tokens. Steps of all
variants take turns, so that a machine that gets slower slows all. Writes
benchmarks/results/decode.json and prints the table of docs/speed.md.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from statistics import quantiles
from typing import Annotated, Any

import torch
import transformers
import typer
from rich.console import Console
from transformers import DynamicCache, StaticCache

import autoprune
from autoprune import AutoPrune
from autoprune.bench.clock import Clock
from autoprune.bench.memory import cache_bytes
from autoprune.bench.subjects import build
from autoprune.files import write_whole

RESULTS = Path(__file__).parent / "results"
WARM_UP = 3


@dataclass
class Variant:
    """One way to decode: a prompt in a cache, and a function for the next token."""

    label: str
    step: Callable[..., Any]
    cache: Any
    token: torch.Tensor

    def advance(self) -> None:
        logits = self.step(input_ids=self.token, past_key_values=self.cache).logits
        # Compiled steps are guarded on strides, and a view of the logits has others.
        self.token = logits[:, -1:].argmax(dim=-1).clone()


def prefilled(label: str, model: Any, prompts: dict, cache: Any, compiled: bool) -> Variant:
    """A variant whose cache holds the prompts."""
    logits = model(**prompts, past_key_values=cache, logits_to_keep=1).logits
    step = model.forward
    if compiled:
        step = torch.compile(step, fullgraph=True, dynamic=False)
    return Variant(label, step, cache, logits.argmax(dim=-1).clone())


def variants(batch: int, images: int, text: int, budget: float, new: int) -> list[Variant]:
    """The plain and the pruned model on each kind of cache."""
    device = torch.device("cpu")
    subject = build("small", text, images, device, torch.float32)
    plain, prompts = subject.model, subject.prompts(batch)
    pruned = build("small", text, images, device, torch.float32).model
    handle = AutoPrune(budget).attach(pruned)
    length = prompts["input_ids"].shape[1]

    def full() -> StaticCache:
        return StaticCache(config=plain.config.get_text_config(), max_cache_len=length + new)

    own = handle.static_cache(length - text, text, new)
    return [
        prefilled("plain, growing cache", plain, prompts, DynamicCache(), False),
        prefilled("pruned, growing cache", pruned, prompts, DynamicCache(), False),
        prefilled("plain, static cache, compiled", plain, prompts, full(), True),
        prefilled("pruned, static cache, compiled", pruned, prompts, full(), True),
        prefilled("pruned, own-length static cache, compiled", pruned, prompts, own, True),
    ]


def measure(ways: list[Variant], steps: int, clock: Clock) -> list[dict]:
    """Milliseconds of a step, and bytes held, of each variant."""
    for _ in range(WARM_UP):
        for way in ways:
            way.advance()
    times: list[list[float]] = [[] for _ in ways]
    for _ in range(steps):
        for way, seconds in zip(ways, times, strict=True):
            start = clock.mark()
            way.advance()
            seconds.extend(clock.seconds([start, clock.mark()]))
    rows = []
    for way, seconds in zip(ways, times, strict=True):
        low, middle, high = (1000 * value for value in quantiles(seconds, n=4))
        row = {"variant": way.label, "ms": middle, "quartiles": [low, high]}
        rows.append(row | {"kv_bytes": cache_bytes(way.cache)})
    return rows


def table(measured: dict[int, list[dict]]) -> str:
    """The results in Markdown."""
    lines = [
        "| " + " | ".join(["", *(f"batch {n}: ms | KV MB" for n in measured)]) + " |",
        "|---" + "|--:|--:" * len(measured) + "|",
    ]
    for rows in zip(*measured.values(), strict=True):
        cells = [f"{row['ms']:.1f} | {row['kv_bytes'] / 1e6:.0f}" for row in rows]
        lines.append("| " + " | ".join([rows[0]["variant"], *cells]) + " |")
    return "\n".join(lines)


def main(
    batch: Annotated[str, typer.Option(help="batch sizes, with commas")] = "1,8",
    images: Annotated[int, typer.Option(help="pictures of 576 tokens")] = 5,
    text: Annotated[int, typer.Option(help="other tokens of the prompt")] = 64,
    budget: Annotated[float, typer.Option(help="mean visual tokens per layer")] = 320,
    steps: Annotated[int, typer.Option(help="steps of each variant")] = 40,
    threads: Annotated[int, typer.Option()] = 1,
    output: Annotated[Path, typer.Option()] = RESULTS / "decode.json",
) -> None:
    """Measure, print and write the table."""
    torch.set_num_threads(threads)
    clock = Clock(torch.device("cpu"))
    new = WARM_UP + steps + 1
    measured = {}
    for size in map(int, batch.split(",")):
        torch._dynamo.reset()
        measured[size] = measure(variants(size, images, text, budget, new), steps, clock)
    command = f"python benchmarks/decode.py --batch {batch} --images {images} --text {text}"
    record = {
        "command": f"{command} --budget {budget:g} --steps {steps} --threads {threads}",
        "date": date.today().isoformat(),
        "machine": f"{platform.machine()}, CPU, {threads} threads, float32, {clock.name}",
        "versions": {
            "autoprune": autoprune.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "batches": measured,
    }
    write_whole(output, json.dumps(record, indent=1))
    Console().print(table(measured), soft_wrap=True, markup=False)


if __name__ == "__main__":
    with torch.inference_mode():
        typer.run(main)
