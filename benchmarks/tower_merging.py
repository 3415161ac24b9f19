"""Time of a vision tower whose patches merge from block to block, as ToMe and Turbo do.

    python benchmarks/tower_merging.py

A LLaVA with random weights: the tower of LLaVA-1.5 (CLIP ViT-L/14 at 336 pixels, 24 blocks, 576 patches)
in front of a small decoder. The plain model and every setting take turns; ratios are those within a round.
Writes benchmarks/results/tower_merging.json and prints the table of docs/speed.md.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from statistics import quantiles
from typing import Annotated, Any

import torch
import transformers
import typer
from rich.console import Console

import autoprune
from autoprune.bench.clock import Clock
from autoprune.bench.measure import time_once
from autoprune.bench.results import describe
from autoprune.bench.subjects import Configuration, Subject, clip, llava, random_prompts, square
from autoprune.files import write_whole

RESULTS = Path(__file__).parent / "results"
PATCHES = 24 * 24


def subject(blocks: int, width: int, text: int) -> Subject:
    """A LLaVA with a tower of this size and a small decoder, random weights of a fixed seed."""
    config = llava(
        "LlavaConfig",
        clip(width, blocks, width // 64),
        vocabulary=4096,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=4,
        num_attention_heads=4,
    )
    row = Configuration(lambda: config, square, PATCHES)
    torch.manual_seed(0)
    model: Any = transformers.LlavaForConditionalGeneration._from_config(config).eval()
    return Subject("llava", model, lambda batch: random_prompts(row, config, batch, text, 1))


@contextmanager
def entering(model: Any) -> Iterator[list[int]]:
    """How many tokens enter each block of the tower."""
    counts: list[int] = []
    blocks = next(
        part
        for part in model.get_encoder("image").modules()
        if isinstance(part, torch.nn.ModuleList)
    )
    handles = [
        block.register_forward_pre_hook(lambda _, args: counts.append(args[0].shape[1]))
        for block in blocks
    ]
    try:
        yield counts
    finally:
        for handle in handles:
            handle.remove()


def tower_flops(counts: list[int], width: int) -> int:
    """Projections (4 width^2), MLP (8 width^2) and attention; a multiply-add is 2 FLOPs."""
    return sum(24 * n * width**2 + 4 * n * n * width for n in counts)


@torch.inference_mode()
def lengths(model: Any, prompts: dict, method: Any) -> list[int]:
    """Tokens that enter each block of the tower."""
    with nullcontext() if method is None else method(model), entering(model) as counts:
        model(**prompts, logits_to_keep=1)
    return counts


def main(
    blocks: Annotated[int, typer.Option(help="of the tower")] = 24,
    width: Annotated[int, typer.Option(help="of the tower")] = 1024,
    budgets: Annotated[str, typer.Option(help="visual tokens, with commas")] = "192,128,64",
    repeats: Annotated[int, typer.Option(help="rounds", min=2)] = 5,
    output: Annotated[Path, typer.Option(help="JSON file")] = RESULTS / "tower_merging.json",
) -> None:
    torch.set_num_threads(1)
    made, clock = subject(blocks, width, text=32), Clock(torch.device("cpu"))
    model, prompts = made.model, made.prompts(1)
    wanted = [float(budget) for budget in budgets.split(",")]
    ways: dict[str, Any] = {"plain": None}
    for name in ("tome", "turbo"):
        ways |= {f"{name} at {budget:g}": autoprune.create(name, budget) for budget in wanted}
    counts = {label: lengths(model, prompts, method) for label, method in ways.items()}
    taken: dict[str, list[float]] = {label: [] for label in ways}
    for _ in range(repeats):
        for label, method in ways.items():
            taken[label].append(time_once(model, prompts, method, 0, clock)["vision"])
    rows = []
    for label, seconds in taken.items():
        ratios = [own / plain for own, plain in zip(seconds, taken["plain"], strict=True)]
        ideal = tower_flops(counts[label], width) / tower_flops(counts["plain"], width)
        low, middle, high = quantiles(ratios, n=4)
        rows.append(
            {
                "setting": label,
                "of_plain": middle,
                "quartiles": [low, high],
                "of_plain_by_flops": ideal,
                "milliseconds": 1000 * sorted(seconds)[len(seconds) // 2],
                "tokens_per_block": counts[label],
            }
        )
    tower = {"blocks": blocks, "width": width, "patches": PATCHES}
    record = {**describe(made, clock), "tower": tower, "repeats": repeats, "rows": rows}
    write_whole(output, json.dumps(record, indent=1))
    console = Console()
    console.print("| tower | ms | of plain | by FLOPs |\n|---|--:|--:|--:|", markup=False)
    for row in rows:
        cells = (
            row["setting"],
            f"{row['milliseconds']:.0f}",
            f"{row['of_plain']:.2f}",
            f"{row['of_plain_by_flops']:.2f}",
        )
        console.print(f"| {' | '.join(cells)} |", markup=False, soft_wrap=True)
    console.print(f"written: {output}", soft_wrap=True)


if __name__ == "__main__":
    typer.run(main)
