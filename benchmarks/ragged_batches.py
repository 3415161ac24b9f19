"""What to do with prompts of one batch that follow different curves: pad, sort into buckets, or pack.

    python benchmarks/ragged_batches.py
    python benchmarks/ragged_batches.py --model llava-next-7b --budget 640,320,160 --output ragged_gpu.json

Times the decoder's prefill of a batch whose prompts have spread mutual information, three ways in turns:
every layer padded to its longest prompt; the batch sorted by information and run as two; and packed, as the
engine does (`autoprune/engine/tokens/packing.py`). Ratios are those within a round. Writes
benchmarks/results/ragged_batches.json.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table

from autoprune.bench.clock import Clock
from autoprune.bench.measure import time_once
from autoprune.bench.results import describe, padding_waste
from autoprune.bench.subjects import build
from autoprune.bench.variants import SpreadAutoPrune
from autoprune.engine import cuts
from autoprune.files import write_whole
from autoprune.loading import pick_device

RESULTS = Path(__file__).parent / "results"


@contextmanager
def padded() -> Iterator[None]:
    """The engine without packing."""
    before, cuts.WORTH_PACKING = cuts.WORTH_PACKING, float("inf")
    try:
        yield
    finally:
        cuts.WORTH_PACKING = before


def seconds(model, prompts, budget, bits, clock) -> dict[str, float]:
    """Prefill seconds of the three ways."""

    def prefill_of(inputs, method):
        return time_once(model, inputs, method, 1, clock)["prefill"]

    half = len(prompts["input_ids"]) // 2
    step = bits / (len(prompts["input_ids"]) - 1)
    halves = (0.0, step * (half - 1)), (step * half, bits)
    first = {name: value[:half] for name, value in prompts.items()}
    packed = prefill_of(prompts, SpreadAutoPrune(budget, high=bits))
    with padded():
        one = prefill_of(prompts, SpreadAutoPrune(budget, high=bits))
        two = sum(
            prefill_of(first, SpreadAutoPrune(budget, low=low, high=high)) for low, high in halves
        )
    return {"padded": one, "buckets": two, "packed": packed}


def against_padding(rounds: list[dict[str, float]], way: str) -> dict[str, float]:
    """Time over that of padding in the same round: median and quartiles."""
    low, middle, high = np.percentile([r[way] / r["padded"] for r in rounds], [25, 50, 75])
    return {"median": middle, "q1": low, "q3": high}


def main(
    model: Annotated[str, typer.Option(help="small, llava-1.5-7b or llava-next-7b")] = "small",
    budget: Annotated[str, typer.Option(help="mean visual tokens, with commas")] = "192,128,64",
    batch: Annotated[int, typer.Option(help="prompts")] = 8,
    repeats: Annotated[int, typer.Option(help="rounds")] = 10,
    threads: Annotated[int, typer.Option(help="of torch")] = 1,
    output: Annotated[Path, typer.Option()] = RESULTS / "ragged_batches.json",
) -> None:
    """Measure, print and write the table."""
    if batch < 2 or batch % 2:
        raise typer.BadParameter(f"an even number of prompts is run as two batches, got {batch}")
    torch.set_num_threads(threads)
    device = pick_device("auto")
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    subject, clock = build(model, 64, 1, device, dtype), Clock(device)
    prompts, rows = subject.prompts(batch), []
    for bits in (0.25, 1.0):
        for tokens in map(int, budget.split(",")):
            with SpreadAutoPrune(tokens, high=bits)(subject.model) as trace, torch.inference_mode():
                subject.model(**prompts, logits_to_keep=1)
            # The first round warms up.
            rounds = [
                seconds(subject.model, prompts, tokens, bits, clock) for _ in range(repeats + 1)
            ]
            rows.append(
                {
                    "spread": bits,
                    "budget": tokens,
                    "padding": padding_waste(trace.samples),
                    "padded_seconds": statistics.median(r["padded"] for r in rounds[1:]),
                    **{way: against_padding(rounds[1:], way) for way in ("buckets", "packed")},
                }
            )
    command = (
        f"python benchmarks/ragged_batches.py --model {model} --budget {budget} --batch {batch}"
    )
    command += f" --repeats {repeats} --threads {threads}"
    record = {"command": command, **describe(subject, clock), "batch": batch, "rows": rows}
    write_whole(output, json.dumps(record, indent=1))
    table = Table("spread, bits", "budget", "padding", "padded", "buckets", "packed")
    for row in rows:
        ratios = [
            f"{r['median']:.3f} ({r['q1']:.3f} to {r['q3']:.3f})"
            for r in (row["buckets"], row["packed"])
        ]
        padded_time = f"{1000 * row['padded_seconds']:.0f} ms"
        table.add_row(
            str(row["spread"]), str(row["budget"]), f"{row['padding']:.1%}", padded_time, *ratios
        )
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
