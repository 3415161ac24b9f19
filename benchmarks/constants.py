"""Which constants of AutoPrune suit the embedded model: a random search on training scenes.

    python benchmarks/constants.py

Draws constants, answers questions about scenes of the training split at two budgets, and writes every
draw, best first, to benchmarks/results/constants.json. What is found here is judged on held-out scenes by
`autoprune compare` (docs/comparison.md). A run that is stopped continues with the same command.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Iterator
from datetime import date
from itertools import count, islice
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import transformers
import typer

import autoprune
from autoprune import AutoPrune, Budget, tiny
from autoprune.evaluation import Options, Setting, Task, compare
from autoprune.files import write_whole

RESULTS = Path(__file__).parent / "results"
BUDGETS = (24, 16)
FIRST_SCENE = 50_000_000


def training_tasks(per_kind: int) -> list[Task]:
    """Questions about scenes of the training split, one per scene, the kinds taking turns."""
    kinds = [*tiny.EASY, *tiny.HARD]
    return list(islice(_questions(kinds), per_kind * len(kinds)))


def _questions(kinds: list[str]) -> Iterator[Task]:
    due = 0
    for seed in count(FIRST_SCENE):
        scene = tiny.draw_scene(seed, split="train")
        for question in tiny.ask(scene, seed, [kinds[due % len(kinds)]])[:1]:
            due += 1
            yield Task(str(seed), question.kind, question.text, (question.answer,), scene.image)


def draws(number: int, seed: int) -> Iterator[dict[str, float]]:
    """The defaults, then constants drawn around them."""
    rng = np.random.default_rng(seed)
    yield {}
    for _ in range(number):
        yield {
            "k0": round(float(np.exp(rng.uniform(np.log(0.05), np.log(1.6)))), 3),
            "gamma": round(float(rng.uniform(0, 0.6)), 2),
            "x0": round(float(rng.uniform(2, 26)), 1),
            "beta": round(float(rng.uniform(0, 8)), 2),
            "text_weight": float(rng.choice([0.3, 1.0, 3.0, 10.0])),
        }


def main(
    number: Annotated[int, typer.Option(help="constants drawn beside the defaults")] = 48,
    questions: Annotated[int, typer.Option(help="training questions of each kind")] = 100,
    seed: Annotated[int, typer.Option(help="which constants")] = 0,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16")] = "float32",
    workers: Annotated[int, typer.Option(help="processes")] = 2,
    run: Annotated[Path, typer.Option(help="folder of the predictions")] = Path("constants-run"),
    output: Annotated[Path, typer.Option()] = RESULTS / "constants.json",
) -> None:
    """Search, and write what was found."""
    model, processor = tiny.load(dtype=getattr(torch, dtype))
    found = {f"draw {i}": constants for i, constants in enumerate(draws(number, seed))}
    settings = [
        Setting(label, str(budget), AutoPrune(Budget.tokens(budget), **constants))
        for label, constants in found.items()
        for budget in BUDGETS
    ]
    options = Options(batch_size=128, workers=workers, timing=False, show_progress=True)
    rows = compare(model, processor, settings, training_tasks(questions), run, options)
    records = []
    for label, constants in found.items():
        own = {row["budget"]: row["accuracy"] for row in rows if row["method"] == label}
        record = {"constants": constants, "accuracy": own}
        records.append({**record, "mean": sum(own.values()) / len(own)})
    records.sort(key=lambda record: -record["mean"])
    result = {
        "command": f"python benchmarks/constants.py --number {number} --questions {questions} "
        f"--seed {seed} --dtype {dtype}",
        "date": date.today().isoformat(),
        "machine": f"{platform.machine()}, CPU",
        "versions": {
            "autoprune": autoprune.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "budgets": list(BUDGETS),
        "full": rows[0]["accuracy"],
        "draws": records,
    }
    write_whole(output, json.dumps(result, indent=1))
    for record in records[:5]:
        print(f"{record['mean']:.4f}", record["accuracy"], record["constants"] or "the defaults")


if __name__ == "__main__":
    typer.run(main)
