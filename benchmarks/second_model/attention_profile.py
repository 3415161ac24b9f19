"""Where text looks: attention of the two benchmark models, layer by layer, with nothing pruned.

    python attention_profile.py --questions 60

Rows are the text behind the picture, the template included. For each layer the shares are means over
rows, heads and questions: of the first token of the prompt, of all visual tokens, of all other text (the row
itself included), and of the visual token that the rows of a prompt attend to most. Writes
benchmarks/results/attention_profile.json and docs/images/attention_profile.png.
"""

from __future__ import annotations

import argparse
import json
import platform
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from compare import tasks_of
from model import load

from autoprune import __version__, tiny
from autoprune.evaluation import Task, embedded_tasks
from autoprune.evaluation.batches import prepare
from autoprune.files import write_whole
from autoprune.viz import COLOURS, matplotlib_parts, to_png

ROOT = Path(__file__).parents[2]
OUTPUT = ROOT / "benchmarks" / "results" / "attention_profile.json"
PICTURE = ROOT / "docs" / "images" / "attention_profile.png"
LINES = {
    "visual": ("all visual tokens", COLOURS[0], "-"),
    "first": ("first token", COLOURS[1], "--"),
    "text": ("other text", "#495057", ":"),
    "strongest": ("strongest visual token", COLOURS[0], "-."),
}


def main() -> None:
    """Measure both models, write the numbers and draw them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--questions", type=int, default=60, help="of each model, all kinds alike")
    parser.add_argument("--decoder", type=Path, help="GGUF file or a folder of save_pretrained")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    parser.add_argument("--picture", type=Path, default=PICTURE)
    options = parser.parse_args()
    found = {}
    for name, (model, processor), tasks in models(options.questions, options.decoder):
        print(name, len(tasks), "questions", flush=True)
        found[name] = profile(model, processor, tasks)
    record = {
        "command": "python attention_profile.py " + shlex.join(sys.argv[1:]),
        "rows": "text behind the picture; means over rows, heads and questions",
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "autoprune": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "models": found,
    }
    write_whole(options.output, json.dumps(record, indent=1))
    write_whole(options.picture, to_png(draw(found)))
    for name, own in found.items():
        print(name)
        for layer, shares in enumerate(zip(*(own[line] for line in LINES), strict=True)):
            numbers = zip(LINES, shares, strict=True)
            print(f"{layer:3}", "  ".join(f"{line} {share:.3f}" for line, share in numbers))


def models(
    questions: int, decoder: Path | None
) -> Iterator[tuple[str, tuple[Any, Any], list[Task]]]:
    """Each model with its processor and its own held-out questions."""
    each = -(-questions // 9)  # both models have nine kinds
    yield "embedded model", tiny.load(), embedded_tasks(each)[:questions]
    yield "second model (SmolLM2-135M)", load(decoder=decoder), tasks_of(each)[:questions]


@torch.inference_mode()
def profile(model: Any, processor: Any, tasks: Sequence[Task]) -> dict[str, Any]:
    """Shares of each layer, each a list over layers; and how many tokens there are on average."""
    model.set_attn_implementation("eager")
    sums: dict[str, torch.Tensor] = {}
    counts = {"questions": len(tasks), "visual_tokens": 0.0, "text_tokens": 0.0}
    for batch in prepare(model, processor, tasks, batch_size=1):
        inputs = batch.inputs()
        visual = inputs["input_ids"][0] == model.config.image_token_id
        layers = model(**inputs, output_attentions=True).attentions
        for name, share in shares(torch.cat(tuple(layers)), visual).items():
            sums[name] = sums.get(name, 0) + share
        counts["visual_tokens"] += int(visual.sum()) / len(tasks)
        counts["text_tokens"] += int((~visual).sum()) / len(tasks)
    means = {name: (total / len(tasks)).tolist() for name, total in sums.items()}
    return {
        **{name: round(count, 2) for name, count in counts.items()},
        **{name: [round(value, 4) for value in mean] for name, mean in means.items()},
    }


def shares(attention: torch.Tensor, visual: torch.Tensor) -> dict[str, torch.Tensor]:
    """What the text behind a picture attends to, float [layers] each.

    Args:
        attention: [layers, heads, tokens, tokens], rows sum to 1.
        visual: bool [tokens]; the first token is none.
    """
    behind = int(visual.nonzero().max()) + 1
    mean = attention[:, :, behind:].mean(dim=(1, 2))
    first, seen = mean[:, 0], mean[:, visual]
    return {
        "visual": seen.sum(dim=1),
        "first": first,
        "text": mean.sum(dim=1) - first - seen.sum(dim=1),
        "strongest": seen.amax(dim=1),
    }


def draw(found: dict[str, dict[str, Any]]) -> Any:
    """A panel for each model, a line for each share."""
    figure_class, _ = matplotlib_parts()
    figure = figure_class(figsize=(8.0, 3.0), layout="constrained")
    panels = figure.subplots(1, len(found), sharey=True)
    for axes, (name, own) in zip(panels, found.items(), strict=True):
        for line, (label, colour, dash) in LINES.items():
            axes.plot(own[line], color=colour, linestyle=dash, linewidth=1.8, label=label)
        axes.set_title(f"{name}, {own['visual_tokens']:.0f} visual tokens", fontsize=10)
        axes.set_xlabel("layer")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set_ylim(0, 1)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="#e9ecef")
    panels[0].set_ylabel("share of the text's attention")
    figure.legend(
        *panels[0].get_legend_handles_labels(),
        loc="outside lower center",
        ncols=len(LINES),
        frameon=False,
    )
    return figure


if __name__ == "__main__":
    main()
