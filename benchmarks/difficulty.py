"""Which way does difficulty run: do the kinds of questions that suffer most have the least information?

    python benchmarks/difficulty.py
    python benchmarks/difficulty.py --run RUN    # and question by question, from a comparison's folder

The authors of AutoPrune say that easy prompts have much mutual information and hard ones little. This
reads committed results of `autoprune compare` on the embedded model and prints, for each kind of question,
its mean information beside its accuracy whole and pruned, and the rank correlations over the kinds. It
writes them to benchmarks/results/difficulty.json.

A kind's difficulty is measured here, not labelled: its accuracy with all visual tokens, and how much of it
is lost at a budget. What AutoPrune itself loses follows from the information, too; so the loss is also that
of `fixed`, the same curve for all prompts.
"""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from autoprune import tiny
from autoprune.files import write_whole

RESULTS = Path(__file__).parent / "results"
KINDS = (*tiny.EASY, *tiny.HARD)


def row(folder: str, method: str, budget: str) -> dict[str, str]:
    """One line of a comparison's results.csv."""
    with (RESULTS / folder / "results.csv").open(encoding="utf-8", newline="") as file:
        for line in csv.DictReader(file):
            if (line["method"], line["budget"]) == (method, budget):
                return line
    raise ValueError(f"{folder} holds no {method} at {budget}")


def by_kind(line: dict[str, str], column: str) -> dict[str, float]:
    """A column of every kind, "accuracy" or "mutual_information"."""
    return {kind: float(line[f"{column}_{kind}"]) for kind in KINDS}


def rank_correlation(one: list[float], other: list[float]) -> float:
    """Spearman's: the correlation of the ranks, ties sharing their mean."""
    first, second = (ranks(np.array(values)) for values in (one, other))
    return float(np.corrcoef(first, second)[0, 1])


def ranks(values: np.ndarray) -> np.ndarray:
    """1 for the smallest; equal values share the mean of their ranks."""
    below = (values[:, None] > values).sum(axis=1)
    equal = (values[:, None] == values).sum(axis=1)
    return below + (equal + 1) / 2


def described(budget: str) -> dict:
    """Information and accuracy of each kind, and the rank correlations between them."""
    pruned = row("compare_methods", "autoprune", budget)
    information = by_kind(pruned, "mutual_information")
    whole = by_kind(row("compare_methods", "full", "1"), "accuracy")
    kinds = {kind: {"information": information[kind]} for kind in KINDS}
    correlations = {}
    columns = {"whole": whole}
    for name, line in (("autoprune", pruned), ("fixed", row("compare_ablations", "fixed", budget))):
        columns[name] = by_kind(line, "accuracy")
        columns[f"lost by {name}"] = {kind: whole[kind] - columns[name][kind] for kind in KINDS}
    for name, values in columns.items():
        for kind in KINDS:
            kinds[kind][name] = round(values[kind], 6)
        pairs = list(information.values()), list(values.values())
        correlations[name] = round(rank_correlation(*pairs), 3)
    return {"budget": budget, "kinds": kinds, "rank_correlation_with_information": correlations}


def questions(run: Path, budget: str) -> dict:
    """Among questions answered right whole: do those that pruning gets wrong have less information?"""
    whole, pruned = (
        [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        for path in (
            run / "predictions" / f"{name}.jsonl" for name in ("full__1", f"autoprune__{budget}")
        )
    )
    right = [one for full, one in zip(whole, pruned, strict=True) if full["correct"]]
    bits = np.array([one["mutual_information"] for one in right])
    kept = np.array([bool(one["correct"]) for one in right])
    counted = np.array([one["kind"] == "count" for one in right])
    return {
        "right_whole": len(right),
        "lost": int((~kept).sum()),
        "lost_below_kept": below(bits[~kept], bits[kept]),
        "lost_below_kept_without_count": below(bits[~kept & ~counted], bits[kept & ~counted]),
    }


def below(one: np.ndarray, other: np.ndarray) -> float:
    """Chance that a value of the one is below one of the other, ties half."""
    if not len(one) or not len(other):
        return float("nan")
    difference = one[:, None] - other
    return float((difference < 0).mean() + (difference == 0).mean() / 2)


def main(
    budgets: Annotated[str, typer.Option(help="of the comparison, by commas")] = "36,24,16",
    run: Annotated[Path | None, typer.Option(help="folder with predictions")] = None,
    output: Annotated[Path, typer.Option()] = RESULTS / "difficulty.json",
) -> None:
    """Describe and print."""
    found = [described(budget) for budget in budgets.split(",")]
    command = f"python benchmarks/difficulty.py --budgets {budgets}" + (" --run RUN" if run else "")
    if run is not None:
        for one in found:
            if (run / "predictions" / f"autoprune__{one['budget']}.jsonl").is_file():
                one["questions"] = questions(run, one["budget"])
    write_whole(output, json.dumps({"command": command, "budgets": found}, indent=1))
    for one in found:
        print(f"\nbudget {one['budget']}, least information first")
        print(f"{'kind':10} {'bits':>6} {'whole':>6} {'autoprune':>10} {'fixed':>6}")
        for kind, own in sorted(one["kinds"].items(), key=lambda pair: pair[1]["information"]):
            numbers = f"{own['whole']:6.3f} {own['autoprune']:10.3f} {own['fixed']:6.3f}"
            print(f"{kind:10} {own['information']:6.3f} {numbers}")
        print("rank correlation of information with")
        for name, value in one["rank_correlation_with_information"].items():
            print(f"  {name:18} {value:+.2f}")
        print(*(f"{name}: {value}" for name, value in one.get("questions", {}).items()), sep="\n")


if __name__ == "__main__":
    typer.run(main)
