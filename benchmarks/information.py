"""Do kinds of questions differ in mutual information, and what do their curves make of it?

    autoprune compare --methods autoprune --budgets 16 --questions 2000 --output run
    python benchmarks/information.py run

Reads the predictions of a comparison on the embedded model and writes benchmarks/results/information.json and
docs/images/information.png: the distribution of the mutual information for each kind, the schedules that follow
from it, and whether questions with more of it are answered better or worse than others of their kind.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from autoprune import AutoPrune, tiny
from autoprune.files import write_whole
from autoprune.tiny.recipe.architecture import VISUAL_TOKENS
from autoprune.viz import COLOURS, matplotlib_parts, to_png

ROOT = Path(__file__).parents[1]
LAYERS, VISUAL = 16, VISUAL_TOKENS
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


def read(path: Path) -> dict[str, list[dict]]:
    """Records of a file of predictions, by kind."""
    found: dict[str, list[dict]] = {kind: [] for kind in [*tiny.EASY, *tiny.HARD]}
    for line in path.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        found[record["kind"]].append(record)
    return {kind: records for kind, records in found.items() if records}


def describe(records: list[dict], budget: int) -> dict:
    """Quantiles of the information, the schedule of its median, and accuracy of its lower and upper half."""
    bits = np.array([record["mutual_information"] for record in records])
    right = np.array([record["correct"] for record in records], dtype=float)
    upper = bits > np.median(bits)
    return {
        "questions": len(records),
        "mean": float(bits.mean()),
        "quantiles": dict(zip(map(str, QUANTILES), np.quantile(bits, QUANTILES), strict=True)),
        "schedule": AutoPrune(budget).plan(LAYERS, VISUAL, float(np.median(bits))),
        "accuracy": float(right.mean()),
        "accuracy_lower_half": float(right[~upper].mean()),
        "accuracy_upper_half": float(right[upper].mean()),
    }


def separation(kinds: dict[str, list[dict]]) -> float:
    """Chance that an easy question has more information than a hard one (area under the ROC curve).

    Easy and hard are labels of the kinds; what is measured of their difficulty is in difficulty.py.
    """
    easy, hard = (
        np.concatenate([[r["mutual_information"] for r in kinds[k]] for k in group if k in kinds])
        for group in (tiny.EASY, tiny.HARD)
    )
    place = np.argsort(np.argsort(np.concatenate([easy, hard])))[: len(easy)] + 1
    return float((place.sum() - len(easy) * (len(easy) + 1) / 2) / (len(easy) * len(hard)))


def draw(kinds: dict[str, list[dict]], described: dict[str, dict], budget: int):
    """Boxes of the information for each kind, and the schedule of each kind's median."""
    figure_class, _ = matplotlib_parts()
    figure = figure_class(figsize=(9.6, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    boxes = left.boxplot(
        [[r["mutual_information"] for r in records] for records in kinds.values()],
        tick_labels=list(kinds),
        orientation="horizontal",
        showfliers=False,
        whis=(5, 95),
        patch_artist=True,
        medianprops={"color": "#212529"},
    )
    for box, kind in zip(boxes["boxes"], kinds, strict=True):
        box.set_facecolor(COLOURS[0] if kind in tiny.EASY else COLOURS[1])
        box.set_alpha(0.6)
    left.invert_yaxis()
    left.set_xlabel("mutual information, bits (boxes: quartiles, whiskers: 5 to 95 %)")
    left.set_title("easy kinds above, hard ones below", fontsize=10)
    for kind, own in described.items():
        easy = kind in tiny.EASY
        right.plot(
            range(1, LAYERS),
            own["schedule"][1:],
            color=COLOURS[0] if easy else COLOURS[1],
            linestyle="-" if easy else "--",
            linewidth=1.2,
        )
    right.set_xlabel("layer (layer 0 sees every token)")
    right.set_ylabel("visual tokens entering")
    right.set_title(f"schedule of each kind's median, budget {budget}", fontsize=10)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="#e9ecef")
    return figure


def main(
    run: Annotated[Path, typer.Argument(help="folder of a comparison")],
    budget: Annotated[int, typer.Option(help="which budget of it")] = 16,
    output: Annotated[Path, typer.Option()] = ROOT / "benchmarks" / "results" / "information.json",
    picture: Annotated[Path, typer.Option()] = ROOT / "docs" / "images" / "information.png",
) -> None:
    """Describe, draw and print."""
    kinds = read(run / "predictions" / f"autoprune__{budget}.jsonl")
    described = {kind: describe(records, budget) for kind, records in kinds.items()}
    auc = separation(kinds)
    command = f"python benchmarks/information.py RUN --budget {budget}"
    write_whole(
        output,
        json.dumps({"command": command, "easy_above_hard": auc, "kinds": described}, indent=1),
    )
    write_whole(picture, to_png(draw(kinds, described, budget)))
    for kind, own in described.items():
        middle = own["quantiles"]["0.5"]
        halves = f"{own['accuracy_lower_half']:.3f} / {own['accuracy_upper_half']:.3f}"
        print(f"{kind:10} median {middle:.3f} bits, accuracy of lower / upper half {halves}")
    print(f"an easy question has more information than a hard one in {auc:.1%} of pairs")


if __name__ == "__main__":
    typer.run(main)
