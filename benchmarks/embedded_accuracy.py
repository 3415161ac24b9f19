"""Accuracy of the embedded model on held-out questions, whole, pruned by AutoPrune, and at random.

    python benchmarks/embedded_accuracy.py

Writes benchmarks/results/embedded_accuracy.json and prints the table of the README.
"""

from __future__ import annotations

import json
import platform
from datetime import date
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import transformers
import typer
from rich.console import Console

import autoprune
from autoprune import AutoPrune, Budget, tiny
from autoprune.files import write_whole
from autoprune.method import Method
from autoprune.tiny.evaluate import Result, accuracy

RESULTS = Path(__file__).parent / "results"


def settings(first_cut_budgets: tuple[int, ...] = (4, 6, 9), pre_llm: tuple[int, ...] = (9, 18)):
    """What is compared: a label, and the method (None for the whole picture)."""
    yield "all 144 tokens", None
    for share in first_cut_budgets:
        yield f"1/{share}", AutoPrune(Budget.ratio(1 / share))
    for share in pre_llm:
        yield f"1/{share}, `pre_llm`", AutoPrune(Budget.ratio(1 / share), first_cut="pre_llm")
    yield "1/9 at random", autoprune.create("random", budget=Budget.ratio(1 / 9))


def measure(method: Method | None, model, processor, questions) -> tuple[Result, dict]:
    """Answer all questions; the second result is what was spent."""
    if method is None:
        return accuracy(model, processor, questions, show_progress=True), {"mean_tokens": 144.0}
    handle = method.attach(model)
    try:
        result = accuracy(model, processor, questions, show_progress=True)
    finally:
        handle.detach()
    summary = handle.trace.summary()
    samples = handle.trace.samples
    assert len({sum(sample.tokens_per_layer) for sample in samples}) == 1, "the budget is exact"
    return result, {
        "mean_tokens": summary.mean_tokens,
        "flops_saved": summary.flops_saved,
        "kv_bytes_saved": summary.kv_bytes_saved,
        "mutual_information": summary.mutual_information,
    }


def table(rows: list[dict]) -> str:
    """The results in Markdown: kinds down, settings across."""
    head = ["", *(row["label"] for row in rows)]
    lines = [f"| {' | '.join(head)} |", f"|---{'|--:' * len(rows)}|"]
    cells = partial("{:.3f}".format)
    for kind in [*tiny.EASY, *tiny.HARD]:
        lines.append(f"| {kind} | {' | '.join(cells(row['accuracy'][kind]) for row in rows)} |")
    for name in ("all easy", "all hard"):
        lines.append(
            f"| **{name}** | {' | '.join('**' + cells(row[name]) + '**' for row in rows)} |"
        )
    means = " | ".join(f"{row['mean_tokens']:.0f}" for row in rows)
    lines.append(f"| visual tokens per layer | {means} |")
    saved = " | ".join(f"{row.get('flops_saved', 0):.0%}" for row in rows)
    lines.append(f"| decoder prefill FLOPs saved | {saved} |")
    return "\n".join(lines)


def main(
    questions: Annotated[int, typer.Option(help="held-out questions in all")] = 1000,
    seed: Annotated[int, typer.Option(help="which held-out questions")] = 0,
    model: Annotated[Path | None, typer.Option(help="folder of weights")] = None,
    output: Annotated[Path, typer.Option()] = RESULTS / "embedded_accuracy.json",
) -> None:
    """Measure, print and write the table."""
    network, processor = tiny.load(folder=model)
    asked = tiny.heldout_questions(questions, [*tiny.EASY, *tiny.HARD], seed)
    rows = []
    for label, method in settings():
        result, spent = measure(method, network, processor, asked)
        groups = {"all easy": result.accuracy(tiny.EASY), "all hard": result.accuracy(tiny.HARD)}
        rows.append({"label": label, "accuracy": result.per_kind(), **groups, **spent})
    record = {
        "command": f"python benchmarks/embedded_accuracy.py --questions {questions} --seed {seed}",
        "date": date.today().isoformat(),
        "machine": f"{platform.machine()}, CPU, {torch.get_num_threads()} threads, float32",
        "versions": {
            "autoprune": autoprune.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "questions": questions,
        "rows": rows,
    }
    write_whole(output, json.dumps(record, indent=1))
    Console().print(table(rows), soft_wrap=True, markup=False)


if __name__ == "__main__":
    with torch.no_grad():
        typer.run(main)
