"""What a search found, for the caller and for its file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .. import __version__
from ..methods.tuned_file import ModelIdentity, TunedFile, settings_of
from .judgement import Judged
from .search import Trial
from .split import Split


@dataclass(frozen=True)
class Result:
    """What was found. `chosen` is what the file holds, and `verdict` why.

    rules: the same budget for all and rules of a fleet, on the held-out prompts; None if not asked for, or if
    the chosen method shares no budget.
    """

    chosen: Judged
    verdict: str
    judged: list[Judged]
    plain_milliseconds: float | None
    trials: list[Trial]
    file: TunedFile
    rules: list[Judged] | None = None


def tuned_file(
    chosen: Judged,
    verdict: str,
    judged: Sequence[Judged],
    identity: ModelIdentity,
    parts: Split,
    seed: int,
    trials: int,
) -> TunedFile:
    """What is written of the chosen method, which was judged beside others after so many trials."""
    prompts = {
        "tuned_on": parts.tuned_on,
        "judged_on": len(parts.held_out),
        "pictures_judged_on": len(set(parts.pictures)),
        "trials": trials,
        "seed": seed,
    }
    return TunedFile(
        chosen.method.name,
        chosen.method.budget,
        settings_of(chosen.method),
        identity,
        {"verdict": verdict, **{own.label: figures(own) for own in judged}},
        prompts,
        __version__,
    )


def figures(judged: Judged) -> dict[str, Any]:
    """A judged method's figures for JSON."""
    record: dict[str, Any] = {"method": repr(judged.method)}
    if judged.agreement is None:
        return {**record, "refused": judged.reason}
    for name in ("agreement", "difference"):
        estimate = getattr(judged, name)
        if estimate is not None:
            record[name] = [estimate.value, estimate.low, estimate.high]
    for name in ("divergence", "entering", "flops_share", "milliseconds"):
        if getattr(judged, name) is not None:
            record[name] = getattr(judged, name)
    return record
