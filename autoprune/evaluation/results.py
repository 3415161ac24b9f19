"""What the answers of all settings amount to: one flat row per setting."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..budget import Budget
from .run_directory import Answers
from .settings import FULL, Setting
from .statistics import Accuracies, Estimate, bootstrap

Row = dict[str, Any]
_TOLERANCE = 0.02
_DECIMALS = 6
_BOUNDS = ("", "_low", "_high")


def results(
    settings: Sequence[Setting],
    answers: Sequence[Answers | None],
    kinds: Sequence[str],
    refusals: Mapping[Setting, str],
    baseline: str,
    milliseconds: Mapping[Setting, float],
) -> list[Row]:
    """One row per setting, in their order; the columns are those of results.csv.

    Args:
        settings: the reference first.
        answers: of each setting, all to the same questions; None where it could not run.
        kinds: the order of their columns.
        refusals: why a setting could not run.
        baseline: label of the setting that others are compared with, at the same budget.
        milliseconds: prefill time per prompt, where it was measured.
    """
    ran = [i for i, found in enumerate(answers) if found is not None]
    given = [found for found in answers if found is not None]
    accuracies = bootstrap(np.stack([found.correct for found in given]), given[0].kinds)
    column = {setting: ran.index(i) for i, setting in enumerate(settings) if i in ran}
    rivals = {s.budget: column[s] for s in column if s.label == baseline}
    rows = []
    for setting, found in zip(settings, answers, strict=True):
        row: Row = {"method": setting.label, "budget": setting.budget}
        if found is None:
            row |= {"status": "infeasible", "reason": refusals[setting]}
        else:
            row |= {"status": "ok", "reason": ""}
            row |= _spent(setting, found, given[0])
            row |= _timed(setting, milliseconds)
            row |= _accuracy(accuracies, column[setting], rivals.get(setting.budget))
            row |= _per_kind(accuracies, column[setting], kinds)
            row |= _information(found, kinds)
        rows.append(row)
    # Every row has every column, whatever came first.
    columns = list(dict.fromkeys(name for row in sorted(rows, key=len)[::-1] for name in row))
    return [{name: row.get(name) for name in columns} for row in rows]


def check_kinds(kinds: Sequence[str]) -> None:
    """Raise ValueError if two columns of the results would share a name."""
    taken = {f"accuracy{part}{bound}": "" for part in ("", "_micro") for bound in _BOUNDS}
    for kind in dict.fromkeys(kinds):
        for column in (f"accuracy_{kind}{bound}" for bound in _BOUNDS):
            if column in taken:
                raise ValueError(
                    f"kind {kind!r} would share the column {column!r} of the results with "
                    f"{repr(taken[column]) if taken[column] else 'another figure'}; give it another name"
                )
            taken[column] = kind


def overspends(row: Row) -> bool:
    """Whether more visual tokens entered than the budget allows."""
    asked = row["tokens_asked"]
    return asked is not None and row["tokens_entering"] > asked * (1 + _TOLERANCE)


def _spent(setting: Setting, found: Answers, full: Answers) -> Row:
    assert setting.method is not None
    budget = Budget.of(setting.method.budget)
    visual = float(full.entering.mean())
    asked = {"ratio": budget.value * visual, "tokens": min(budget.value, visual)}.get(budget.kind)
    return {
        "questions": len(found.kinds),
        "tokens_asked": asked,
        "tokens_entering": float(found.entering.mean()),
        "flops_share": float(found.flops.sum() / full.flops.sum()),
        "kv_bytes_share": float(found.kv_bytes.sum() / full.kv_bytes.sum()),
    }


def _timed(setting: Setting, milliseconds: Mapping[Setting, float]) -> Row:
    own = milliseconds.get(setting)
    full = next((t for other, t in milliseconds.items() if other.label == FULL), None)
    return {
        "prefill_ms": own,
        "prefill_speedup": full / own if own and full else None,
    }


def _accuracy(accuracies: Accuracies, column: int, rival: int | None) -> Row:
    row = _columns("accuracy", accuracies.macro(column))
    row |= _columns("accuracy_micro", accuracies.micro(column))
    row |= _columns("relative", accuracies.relative(column, 0))
    row |= _columns("difference", None if rival is None else accuracies.difference(column, rival))
    return row


def _per_kind(accuracies: Accuracies, column: int, kinds: Sequence[str]) -> Row:
    row: Row = {}
    for kind in kinds:
        row |= _columns(f"accuracy_{kind}", accuracies.kind(kind, column))
    return row


def _columns(name: str, estimate: Estimate | None) -> Row:
    if estimate is None:
        return dict.fromkeys((name, f"{name}_low", f"{name}_high"))
    bounds = {name: estimate.value, f"{name}_low": estimate.low, f"{name}_high": estimate.high}
    return {k: None if value is None else round(value, _DECIMALS) for k, value in bounds.items()}


def _information(found: Answers, kinds: Sequence[str]) -> Row:
    """Mean mutual information of each kind, in bits."""
    names, measured = np.asarray(found.kinds), ~np.isnan(found.mutual_information)
    row: Row = {}
    for kind in kinds:
        values = found.mutual_information[(names == kind) & measured]
        row[f"mutual_information_{kind}"] = float(values.mean()) if values.size else None
    return row
