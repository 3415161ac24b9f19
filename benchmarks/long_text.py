"""What pruning costs where a long text stands behind a short picture, against the unpruned model.

    python benchmarks/long_text.py
    python benchmarks/long_text.py --model small --budget 96 --text 50,500,2000 --output long_text_small.json

Times the decoder's prefill of one prompt with and without pruning, in turns; ratios are those within a round.
A second table has the peak of memory, measured and as the trace says. Writes
benchmarks/results/long_text.json.
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from autoprune import create, tiny
from autoprune.bench.clock import Clock
from autoprune.bench.measure import hold_once, time_once
from autoprune.bench.results import describe
from autoprune.bench.subjects import Subject, Tensors, build
from autoprune.files import write_whole
from autoprune.loading import pick_device

RESULTS = Path(__file__).parent / "results"
# Ordinary words of the embedded model's vocabulary, and of the random ones'.
WORDS = (10, 400)


def subject_of(name: str, device: torch.device, dtype: torch.dtype) -> Subject:
    """The embedded model, which asks about a scene, or one with random weights."""
    if name != "embedded":
        return build(name, 16, 1, device, dtype)
    model, processor = tiny.load()
    text = tiny.prompt(processor, "how many crosses are there?")
    inputs = processor(images=tiny.draw_scene(0).image, text=text, return_tensors="pt")
    return Subject(name, model.to(device), lambda batch: dict(inputs.to(device)))


def with_text(inputs: Tensors, length: int) -> Tensors:
    """The same prompt with random words behind it, so that so many tokens follow the picture."""
    ids = inputs["input_ids"]
    placeholder = ids[0].mode().values
    behind = ids.shape[1] - 1 - int((ids[0] == placeholder).nonzero().max())
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(*WORDS, (1, max(length - behind, 0)), generator=generator).to(ids)
    ids = torch.cat([ids, words], dim=1)
    return inputs | {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def measure(subject: Subject, length: int, method: Any, repeats: int, clock: Clock) -> dict:
    """One row of the tables."""
    prompt = with_text(subject.prompts(1), length)
    held = hold_once(subject.model, prompt, method)
    rounds = []
    for _ in range(repeats):
        plain = time_once(subject.model, prompt, None, 0, clock)["prefill"]
        rounds.append((plain, time_once(subject.model, prompt, method, 0, clock)["prefill"]))
    ratios = [pruned / plain for plain, pruned in rounds]
    (sample,) = held.samples
    return {
        "text": length,
        "visual": sample.num_visual,
        "mean_tokens": sample.mean_tokens,
        "plain_seconds": statistics.median(plain for plain, _ in rounds),
        "pruned_seconds": statistics.median(pruned for _, pruned in rounds),
        "ratio": statistics.median(ratios),
        "lowest": min(ratios),
        "highest": max(ratios),
        "flops_ratio": sample.flops / sample.flops_full,
        "peak_bytes": held.peak,
        "peak_bytes_trace": sample.peak_bytes,
    }


def main(
    model: Annotated[str, typer.Option(help="embedded, small, llava-1.5-7b, ...")] = "embedded",
    method: Annotated[str, typer.Option()] = "autoprune",
    budget: Annotated[float, typer.Option(help="mean visual tokens of a layer")] = 24,
    text: Annotated[
        str, typer.Option(help="tokens of text, with commas")
    ] = "50,500,2000,4227,8000",
    repeats: Annotated[int, typer.Option(help="rounds")] = 3,
    threads: Annotated[int, typer.Option(help="of torch")] = 1,
    output: Annotated[Path, typer.Option()] = RESULTS / "long_text.json",
) -> None:
    """Measure, print and write the table."""
    torch.set_num_threads(threads)
    device = pick_device("auto")
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    subject, clock = subject_of(model, device, dtype), Clock(device)
    pruning = create(method, budget)
    rows = [measure(subject, n, pruning, repeats, clock) for n in map(int, text.split(","))]
    command = f"python benchmarks/long_text.py --model {model} --method {method}"
    command += f" --budget {budget:g} --text {text} --repeats {repeats} --threads {threads}"
    record = {"command": command, **describe(subject, clock), "rows": rows}
    write_whole(output, json.dumps(record, indent=1))
    table = Table(
        "text", "tokens", "plain s", "pruned s", "pruned / plain", "FLOPs", "peak / trace"
    )
    for row in rows:
        table.add_row(
            str(row["text"]),
            f"{row['mean_tokens']:.1f} of {row['visual']}",
            f"{row['plain_seconds']:.3f}",
            f"{row['pruned_seconds']:.3f}",
            f"{row['ratio']:.3f} ({row['lowest']:.3f} to {row['highest']:.3f})",
            f"{row['flops_ratio']:.3f}",
            f"{row['peak_bytes'] / row['peak_bytes_trace']:.3f}",
        )
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
