"""Time of one decoding step on a long prompt: the plain model, and pruned on caches of three kinds.

    python benchmarks/decode.py
    python benchmarks/decode.py --model llava-next-7b --images 1 --output decode_gpu.json    # on a GPU

A small LLaVA (12 layers, width 512, random weights) with five pictures, 2880 visual tokens, unless told
otherwise. Steps of all variants take turns, so that a machine that gets slower slows all. On a GPU the
compiled ones are CUDA graphs. Writes benchmarks/results/decode.json and prints the table of docs/speed.md.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import quantiles
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from transformers import DynamicCache, StaticCache

from autoprune import AutoPrune
from autoprune.bench.clock import Clock
from autoprune.bench.memory import cache_bytes
from autoprune.bench.results import describe
from autoprune.bench.subjects import Subject, build
from autoprune.files import write_whole
from autoprune.loading import pick_device

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
        mode = "reduce-overhead" if model.device.type == "cuda" else None
        step = torch.compile(step, fullgraph=True, dynamic=False, mode=mode)
    return Variant(label, step, cache, logits.argmax(dim=-1).clone())


@contextmanager
def pruning(model: Any, budget: float) -> Iterator[Any]:
    """The handle of a model that is pruned meanwhile."""
    handle = AutoPrune(budget).attach(model)
    try:
        yield handle
    finally:
        handle.detach()


def variants(
    subjects: tuple[Subject, Subject], handle: Any, batch: int, text: int, new: int
) -> list[Variant]:
    """The plain and the pruned model on each kind of cache."""
    (plain, pruned), prompts = (subject.model for subject in subjects), subjects[0].prompts(batch)
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
    model: Annotated[str, typer.Option(help="small, llava-1.5-7b or llava-next-7b")] = "small",
    batch: Annotated[str, typer.Option(help="batch sizes, with commas")] = "1,8",
    images: Annotated[int, typer.Option(help="pictures")] = 5,
    text: Annotated[int, typer.Option(help="other tokens of the prompt")] = 64,
    budget: Annotated[float, typer.Option(help="mean visual tokens per layer")] = 320,
    steps: Annotated[int, typer.Option(help="steps of each variant")] = 40,
    device: Annotated[str, typer.Option(help="cpu, cuda ...; auto takes a GPU")] = "auto",
    threads: Annotated[int, typer.Option()] = 1,
    output: Annotated[Path, typer.Option()] = RESULTS / "decode.json",
) -> None:
    """Measure, print and write the table."""
    torch.set_num_threads(threads)
    place = pick_device(device)
    dtype = torch.float32 if place.type == "cpu" else torch.bfloat16
    # One stays plain, the other is pruned.
    subjects = (
        build(model, text, images, place, dtype),
        build(model, text, images, place, dtype),
    )
    clock, new = Clock(place), WARM_UP + steps + 1
    measured: dict[int, list[dict]] = {}
    command = f"python benchmarks/decode.py --model {model} --batch {batch} --images {images} --text {text}"
    record = {
        "command": f"{command} --budget {budget:g} --steps {steps} --device {place.type} --threads {threads}",
        **describe(subjects[0], clock),
        "batches": measured,
    }
    for size in map(int, batch.split(",")):
        torch._dynamo.reset()
        with pruning(subjects[1].model, budget) as handle:
            ways = variants(subjects, handle, size, text, new)
            measured[size] = measure(ways, steps, clock)
            del ways
        write_whole(output, json.dumps(record, indent=1))
    Console().print(table(measured), soft_wrap=True, markup=False)


if __name__ == "__main__":
    with torch.inference_mode():
        typer.run(main)
