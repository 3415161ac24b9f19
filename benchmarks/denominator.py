"""How strongly the text sees what pruning keeps: the same tokens, pruned over unpruned, layer by layer.

    python benchmarks/denominator.py

Asks the embedded model to count, with eager attention, and compares the text's attention on the kept visual
tokens with what the unpruned model gives the same tokens: without a summary and with one. Writes
benchmarks/results/denominator.json and docs/images/denominator.png.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import transformers
import typer

import autoprune
from autoprune import AutoPrune, tiny
from autoprune.evaluation.tasks import embedded_tasks
from autoprune.files import write_whole
from autoprune.viz import COLOURS, matplotlib_parts, to_png

ROOT = Path(__file__).parents[1]
MERGERS = {"without a summary": None, "with a summary": "summary"}


@contextmanager
def attention_of(model: Any) -> Iterator[list[torch.Tensor]]:
    """Collects every decoder layer's attention, [heads, rows, columns]."""
    seen: list[torch.Tensor] = []
    hooks = [
        layer.self_attn.register_forward_hook(lambda _m, _i, output: seen.append(output[1][0]))
        for layer in model.get_decoder().layers
    ]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def ratios(model: Any, inputs: Any, budget: float, merger: str | None) -> list[float]:
    """For each layer: the text's attention on the kept tokens, pruned over unpruned."""
    method = AutoPrune(budget, first_ranking="text", merger=merger)
    with torch.inference_mode():
        with attention_of(model) as whole:
            model(**inputs)
        with method(model) as trace, attention_of(model) as pruned:
            model(**inputs)
    (sample,) = trace.samples
    head = int(sample.visual_positions[0])
    text = sample.num_text - head
    found = []
    for layer, (before, after) in enumerate(zip(whole, pruned, strict=True)):
        kept = sample.kept[layer]
        itself = kept != -1 if sample.summary_token is None else kept != sample.summary_token
        here = after[:, -text:, head : head + len(kept)][..., itself]
        there = before[:, -text:, head + kept[itself]]
        # In the last layers there may be nothing but the summary.
        found.append(float(here.sum() / there.sum()) if itself.any() else float("nan"))
    return found


def numbers(values: np.ndarray) -> list[float | None]:
    """For JSON: None where a question has no kept token in the layer."""
    return [round(float(value), 3) if np.isfinite(value) else None for value in values]


def draw(found: dict[str, np.ndarray]) -> Any:
    """The mean over questions in each layer, and where nothing changes."""
    figure_class, _ = matplotlib_parts()
    figure = figure_class(figsize=(6.4, 3.4), layout="constrained")
    axes = figure.subplots()
    axes.axhline(1, color=COLOURS[5], linewidth=1, linestyle=":")
    styles = zip(found.items(), (COLOURS[1], COLOURS[0]), ("--", "-"), strict=True)
    for (name, values), colour, style in styles:
        mean = values.mean(axis=0)
        mean = mean[np.isfinite(mean)]
        axes.plot(mean, color=colour, linestyle=style, linewidth=2)
        axes.annotate(
            name, (5, mean[5]), (0, 10), textcoords="offset points", color=colour, ha="right"
        )
    axes.set_xlabel("layer")
    axes.set_ylabel("attention on the kept tokens,\npruned / unpruned")
    axes.set_yscale("log", base=2)
    axes.set_yticks([1, 2, 4, 8, 16], ["1", "2", "4", "8", "16"])
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#e9ecef")
    return figure


def main(
    questions: Annotated[int, typer.Option(help="counting questions")] = 100,
    budget: Annotated[float, typer.Option(help="mean visual tokens")] = 16,
    output: Annotated[Path, typer.Option()] = ROOT / "benchmarks" / "results" / "denominator.json",
    picture: Annotated[Path, typer.Option()] = ROOT / "docs" / "images" / "denominator.png",
) -> None:
    """Measure, draw and print."""
    model, processor = tiny.load()
    model.set_attn_implementation("eager")
    found: dict[str, list[list[float]]] = {name: [] for name in MERGERS}
    for task in embedded_tasks(questions, ["count"]):
        prompt = tiny.prompt(processor, task.question)
        inputs = processor(images=task.image, text=prompt, return_tensors="pt")
        for name, merger in MERGERS.items():
            found[name].append(ratios(model, inputs, budget, merger))
    values = {name: np.array(rows) for name, rows in found.items()}
    result = {
        "command": f"python benchmarks/denominator.py --questions {questions} --budget {budget:g}",
        "machine": f"{platform.machine()}, CPU",
        "versions": {
            "autoprune": autoprune.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "pruned_over_unpruned": {
            name: {
                "mean": numbers(own.mean(axis=0)),
                "low": numbers(np.quantile(own, 0.05, axis=0)),
                "high": numbers(np.quantile(own, 0.95, axis=0)),
            }
            for name, own in values.items()
        },
    }
    write_whole(output, json.dumps(result, indent=1))
    write_whole(picture, to_png(draw(values)))
    for name, own in values.items():
        print(f"{name:20}", " ".join(f"{value:.2f}" for value in own.mean(axis=0)))


if __name__ == "__main__":
    typer.run(main)
