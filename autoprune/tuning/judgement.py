"""What was found, the default and a few baselines on prompts that nothing was tuned on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..evaluation.answering import Refused
from ..evaluation.statistics import Estimate, bootstrap
from ..methods.base import Method
from .agreement import Scores

TUNED, DEFAULT = "tuned", "default"
SAME = "the same for all"


@dataclass(frozen=True)
class Judged:
    """One method on the held-out prompts; None where it could not run, and `reason` says why.

    agreement: share of the prompts, or of a long answer's tokens, with its 95 % interval.
    difference: agreement less the default's, paired; None for the default itself, or if that cannot run.
    divergence: mean KL, nats. entering: mean visual tokens entering a layer. flops_share: of the
    plain decoder's prefill. milliseconds: prefill per prompt; None if not measured.
    """

    label: str
    method: Method
    agreement: Estimate | None = None
    difference: Estimate | None = None
    divergence: float | None = None
    entering: float | None = None
    flops_share: float | None = None
    milliseconds: float | None = None
    reason: str = ""


def judge(
    contenders: Mapping[str, Method],
    ask: Callable[[Method], Scores],
    pictures: Sequence[int],
    against: str = DEFAULT,
) -> list[Judged]:
    """Ask every contender the held-out prompts; differences are to the one called `against`.

    Args:
        ask: scores a method on the held-out prompts. Raises Refused where it cannot run.
        pictures: the picture of each prompt, as a number.
    """
    scores: dict[str, Scores] = {}
    reasons: dict[str, str] = {}
    for label, method in contenders.items():
        try:
            scores[label] = ask(method)
        except Refused as error:
            reasons[label] = str(error)
    labels = list(scores)
    agreement = [scores[label].agreement for label in labels]
    others = []
    if against in scores:
        others = [own - scores[against].agreement for own in agreement]
    estimates = mean_by_picture([*agreement, *others], pictures)
    values = dict(zip(labels, estimates, strict=False))
    differences = dict(zip(labels, estimates[len(labels) :], strict=False))
    differences.pop(against, None)
    return [
        _judged(label, method, scores[label], values[label], differences.get(label))
        if label in scores
        else Judged(label, method, reason=reasons[label])
        for label, method in contenders.items()
    ]


def choose(judged: Sequence[Judged]) -> tuple[Judged, str]:
    """Which settings to write, and why.

    The tuned ones only if they are better than the default by more than chance explains, or if the default
    cannot run.

    Raises:
        Refused: neither can run.
    """
    rows = {own.label: own for own in judged}
    tuned, default = rows[TUNED], rows[DEFAULT]
    if tuned.agreement is None and default.agreement is None:
        raise Refused(tuned.reason)
    if default.agreement is None:
        return tuned, f"the default cannot run here: {default.reason}"
    if tuned.method == default.method:
        return default, "the search found nothing better than the default"
    gain = tuned.difference
    if gain is None:
        return default, f"what was tuned cannot run on the held-out prompts: {tuned.reason}"
    said = f"{_points(gain.value)} [{_points(gain.low)}, {_points(gain.high)}] points of agreement"
    if gain.low is None or gain.low <= 0:
        return default, (
            f"what was tuned is not better than the default beyond chance ({said}), so the default is kept"
        )
    return tuned, f"what was tuned is better than the default by {said}"


def choose_rule(judged: Sequence[Judged], best: str) -> tuple[Judged, str]:
    """Whether a budget is to be shared over a batch by the rule that was `best` in tuning, and why.

    Only if it is better than the same budget for all, labelled `SAME`, by more than chance explains.
    """
    rows = {own.label: own for own in judged}
    own, same = rows[best], rows[SAME]
    gain = own.difference
    if gain is None:
        return same, f"the same budget for all, as {best} cannot run: {own.reason}"
    said = f"{_points(gain.value)} [{_points(gain.low)}, {_points(gain.high)}] points of agreement"
    if gain.low is None or gain.low <= 0:
        return same, f"the same budget for all, as {best} is not better beyond chance ({said})"
    return (
        own,
        f"a batch shares its budget by the rule {best}, better than the same for all by {said}",
    )


def mean_by_picture(
    figures: Sequence[NDArray[np.float64]], pictures: Sequence[int]
) -> list[Estimate]:
    """The mean over prompts of each figure, with an interval that draws pictures anew.

    Prompts about one picture go together: they are no independent witnesses.

    Args:
        figures: each [prompts].
        pictures: the picture of each prompt, as a number.
    """
    if not figures:
        return []
    _, place = np.unique(np.asarray(pictures), return_inverse=True)
    sums = [np.bincount(place, figure) for figure in figures]
    counts = np.bincount(place).astype(float)
    drawn = bootstrap([np.stack([*sums, counts])], ["all"] * len(counts))[0].kinds["all"]
    found = [drawn.ratio(index, len(sums)) for index in range(len(sums))]
    return [estimate for estimate in found if estimate is not None]


def _judged(
    label: str, method: Method, scores: Scores, value: Estimate, difference: Estimate | None
) -> Judged:
    return Judged(
        label,
        method,
        value,
        difference,
        float(scores.divergence.mean()),
        float(scores.entering.mean()),
        float(scores.flops_share.mean()),
    )


def _points(value: float | None) -> str:
    return "?" if value is None else f"{100 * value:+.1f}"
