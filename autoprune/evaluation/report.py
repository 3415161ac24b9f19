"""The results as files: CSV, JSON, Markdown, a page and a plot."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..files import write_whole
from ..viz import matplotlib_parts, to_png
from .page import Change, to_page
from .plot import plot
from .results import Row
from .settings import FULL
from .tables import HEADINGS, by_budget, cells, infeasible, setup

_OFF = 0.005


def check_plotting() -> None:
    """Raise ImportError now, rather than after hours of work, if matplotlib is missing."""
    matplotlib_parts()


def write_report(
    folder: Path,
    rows: Sequence[Row],
    config: dict[str, Any],
    baseline: str,
    changes: Sequence[Change] = (),
) -> None:
    """Write results.csv, results.json, report.md, report.html and accuracy_vs_flops.png.

    Args:
        changes: answers that pruning changed, for the page; see `changed_answers`.
    """
    write_whole(folder / "results.csv", to_csv(rows))
    record = {**config, "baseline": baseline, "rows": rows}
    write_whole(folder / "results.json", json.dumps(record, indent=1, allow_nan=False))
    write_whole(folder / "report.md", to_markdown(rows, config, baseline))
    write_whole(folder / "report.html", to_page(rows, config, baseline, changes))
    write_whole(folder / "accuracy_vs_flops.png", to_png(plot(rows, baseline)))


def to_csv(rows: Sequence[Row]) -> str:
    """One line per setting; cells without a value are empty."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def to_markdown(rows: Sequence[Row], config: dict[str, Any], baseline: str) -> str:
    """The whole report."""
    kinds = config["kinds"]
    lines = ["# Comparison of pruning methods", ""]
    lines += [f"`{config['command']}`", "", *(f"* {line}" for line in setup(config)), ""]
    lines += [
        "The agreement is the share of questions that are answered as the unpruned model answers them, right "
        f"or wrong. The difference is to `{baseline}` at the same budget; `*` where its interval leaves out 0. "
        "Square brackets hold 95 % confidence intervals: over questions, and of prefill times over timed "
        "batches. They are left out where both bounds read like the figure, and where there are too few "
        "questions or batches to tell.",
        "",
    ]
    lines += ["![Accuracy against decoder prefill FLOPs](accuracy_vs_flops.png)", ""]
    lines += ["## Accuracy", "", *_overview(rows), ""]
    lines += [
        "In parentheses the mean number of tokens that entered a layer, where it is off the budget by more "
        "than half a per cent; `-`: infeasible or not asked.",
        "",
    ]
    for budget, group in [("1 (nothing pruned)", rows[:1]), *by_budget(rows)]:
        lines += [f"## Budget {budget}", "", *_table(HEADINGS, [cells(row) for row in group]), ""]
        head = ("method", *kinds)
        body = [
            [row["method"], *(f"{row[f'accuracy_{kind}']:.3f}" for kind in kinds)] for row in group
        ]
        lines += [*_table(head, body), ""]
    refused = infeasible(rows)
    if refused:
        lines += ["## Infeasible", "", *(f"* {line}" for line in refused), ""]
    return "\n".join(lines)


def _overview(rows: Sequence[Row]) -> list[str]:
    """Accuracy of each method at each budget."""
    pruned = {(row["method"], row["budget"]): row for row in rows if row["method"] != FULL}
    methods, budgets = (list(dict.fromkeys(names)) for names in zip(*pruned, strict=True))
    body = [
        [method, *(_overview_cell(pruned.get((method, budget))) for budget in budgets)]
        for method in methods
    ]
    return _table(("method", *budgets), body)


def _overview_cell(row: Row | None) -> str:
    if row is None or row["status"] != "ok":
        return "-"
    asked, entering = row["tokens_asked"], row["tokens_entering"]
    off = asked is not None and abs(entering - asked) > _OFF * asked
    return f"{row['accuracy']:.3f}" + (f" ({entering:.4g})" if off else "")


def _table(head: Sequence[str], body: Sequence[Sequence[str]]) -> list[str]:
    rows = [[cell.replace("|", "\\|") for cell in row] for row in (head, *body)]
    first, *rest = (f"| {' | '.join(row)} |" for row in rows)
    return [first, f"|---{'|--:' * (len(head) - 1)}|", *rest]
