"""What the answers of all settings amount to: one flat row per setting."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..policy.budget import Budget
from .run_directory import Answers
from .settings import Setting
from .statistics import Estimate, Means, Resampled, bootstrap, bootstrap_median
from .tasks import normalised

Row = dict[str, Any]
_TOLERANCE = 0.02
_DECIMALS = 6
_BOUNDS = ("", "_low", "_high")


@dataclass(frozen=True)
class _Measured:
    """The figures of all settings that ran, the reference first."""

    correct: Means
    agrees: Means
    entering: Means
    flops: Means
    kv_bytes: Means
    milliseconds: Resampled | None


def results(
    settings: Sequence[Setting],
    answers: Sequence[Answers | None],
    kinds: Sequence[str],
    refusals: Mapping[Setting, str],
    baseline: str,
    milliseconds: Sequence[Sequence[float]] = (),
) -> list[Row]:
    """One row per setting, in their order; the columns are those of results.csv.

    Args:
        settings: the reference first.
        answers: of each setting, all to the same questions; None where it could not run.
        kinds: the order of their columns.
        refusals: why a setting could not run.
        baseline: label of the setting that others are compared with, at the same budget.
        milliseconds: prefill times per prompt, in the same batches of prompts for each setting that ran;
            empty where they were not measured.
    """
    given = [found for found in answers if found is not None]
    ran = [setting for setting in settings if setting not in refusals]
    measured = _measured(given, milliseconds)
    rivals = {setting.budget: i for i, setting in enumerate(ran) if setting.label == baseline}
    rows = []
    for setting, found in zip(settings, answers, strict=True):
        row: Row = {"method": setting.label, "budget": setting.budget}
        if found is None:
            row |= {"status": "infeasible", "reason": refusals[setting]}
        else:
            own = ran.index(setting)
            row |= {"status": "ok", "reason": "", "questions": len(found.kinds)}
            row |= _spent(setting, measured, own)
            row |= _timed(measured.milliseconds, own)
            row |= _accuracy(measured.correct, own, rivals.get(setting.budget))
            row |= _columns("agreement", measured.agrees.macro.estimate(own))
            row |= _per_kind(measured.correct, own, kinds)
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


def _measured(given: Sequence[Answers], milliseconds: Sequence[Sequence[float]]) -> _Measured:
    figures = ("correct", "entering", "flops", "kv_bytes")
    values = [np.stack([getattr(found, name) for found in given]) for name in figures]
    *means, agrees = bootstrap([*values, _agrees(given)], given[0].kinds)
    times = bootstrap_median(np.array(milliseconds)) if milliseconds else None
    named = dict(zip(figures, means, strict=True))
    return _Measured(**named, agrees=agrees, milliseconds=times)


def _agrees(given: Sequence[Answers]) -> NDArray[np.bool_]:
    """Whether each setting says what the first one says, bool [settings, questions]."""
    first, *others = ([normalised(text) for text in found.predictions] for found in given)
    same = [[a == b for a, b in zip(first, texts, strict=True)] for texts in (first, *others)]
    return np.array(same)


def _spent(setting: Setting, measured: _Measured, own: int) -> Row:
    assert setting.method is not None
    budget = Budget.of(setting.method.budget)
    # Unpruned, all visual tokens of a prompt enter every layer.
    visual = measured.entering.micro.estimate(0).value
    asked = {"ratio": budget.value * visual, "tokens": min(budget.value, visual)}.get(budget.kind)
    row: Row = {"tokens_asked": None if asked is None else round(asked, _DECIMALS)}
    row |= _columns("tokens_entering", measured.entering.micro.estimate(own))
    row |= _columns("flops_share", measured.flops.micro.ratio(own, 0))
    row |= _columns("kv_bytes_share", measured.kv_bytes.micro.ratio(own, 0))
    return row


def _timed(milliseconds: Resampled | None, own: int) -> Row:
    if milliseconds is None:
        return _columns("prefill_ms", None) | _columns("prefill_speedup", None)
    row = _columns("prefill_ms", milliseconds.estimate(own))
    return row | _columns("prefill_speedup", milliseconds.ratio(0, own))


def _accuracy(correct: Means, own: int, rival: int | None) -> Row:
    row = _columns("accuracy", correct.macro.estimate(own))
    row |= _columns("accuracy_micro", correct.micro.estimate(own))
    row |= _columns("relative", correct.macro.ratio(own, 0))
    row |= _columns("difference", None if rival is None else correct.macro.difference(own, rival))
    return row


def _per_kind(correct: Means, own: int, kinds: Sequence[str]) -> Row:
    row: Row = {}
    for kind in kinds:
        row |= _columns(f"accuracy_{kind}", correct.kinds[kind].estimate(own))
    return row


def _columns(name: str, estimate: Estimate | None) -> Row:
    if estimate is None:
        return dict.fromkeys((name, f"{name}_low", f"{name}_high"))
    bounds = {name: estimate.value, f"{name}_low": estimate.low, f"{name}_high": estimate.high}
    # A zero has no sign.
    return {
        k: None if value is None else round(value, _DECIMALS) + 0.0 for k, value in bounds.items()
    }


def _information(found: Answers, kinds: Sequence[str]) -> Row:
    """Mean mutual information of each kind, in bits."""
    names, measured = np.asarray(found.kinds), ~np.isnan(found.mutual_information)
    row: Row = {}
    for kind in kinds:
        values = found.mutual_information[(names == kind) & measured]
        row[f"mutual_information_{kind}"] = float(values.mean()) if values.size else None
    return row
