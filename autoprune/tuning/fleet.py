"""By which rule a batch shares its budget: fitted to a method whose settings are found, without labels."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..methods.autoprune import AutoPrune
from ..policy.fleet import Fleet
from ..policy.rules import FEWEST_ROWS, CalibratedRule, Floats, InformationRule, Rule, Signals
from .agreement import Scores
from .examination import Examination

LEVELS = (0.4, 0.55, 0.75, 1.0, 1.4, 1.9)
"""What prompts get in turn, as multiples of what each gets alone. Their mean is 1."""
POWERS = (0.5, 1.0, 2.0)
"""Of the information rules that are tried."""
CALIBRATED = "calibrated"
RULES = len(POWERS) + 1
STEPS = len(LEVELS) + RULES
"""How often all prompts that are tuned on are asked."""

Ask = Callable[[AutoPrune, int], Scores]
"""What a method scores on one part of the prompts. Raises Refused where it cannot run."""


@dataclass(frozen=True)
class Observed:
    """What is known of the prompts of one part. signals: at the budget that is tuned for.

    agreement: [prompts, levels], with the plain model's answers.
    """

    signals: Sequence[Signals]
    agreement: NDArray[np.float64]


@dataclass(frozen=True)
class Rules:
    """Rules that were compared on the prompts that are tuned on. by_label: fitted to all of these.

    values: `Scores.value` of each; a calibrated rule is asked prompts that it was not fitted to.
    """

    by_label: dict[str, Rule]
    values: dict[str, float]

    @property
    def best(self) -> str:
        """The label of the best."""
        return max(self.values, key=self.values.__getitem__)


def open_to_all_layers(method: AutoPrune) -> AutoPrune:
    """The same method, ready to share from layer 0 on if it looks ahead of that layer: it measures there."""
    return dataclasses.replace(method, mi_layer="peek") if method.first_cut == "peek" else method


def shared(method: AutoPrune, rule: Rule) -> AutoPrune:
    """The same method with its budget over a batch."""
    budget = dataclasses.replace(method.budget, over="batch")
    return dataclasses.replace(method, budget=budget, fleet=Fleet(rule))


@dataclass(frozen=True)
class TakingTurns:
    """A rule by which the prompts of a batch get the levels in turn, the first one that of number `turn`."""

    turn: int

    def __call__(self, signals: Sequence[Signals], tokens: Floats) -> Floats:
        levels = np.array(LEVELS)[(np.arange(len(signals)) + self.turn) % len(LEVELS)]
        wanted = levels * [own.own_tokens for own in signals]
        return np.abs(tokens - wanted[:, None])


def find_rules(method: AutoPrune, parts: Sequence[Examination], ask: Ask) -> Rules:
    """Fit a calibrated rule, and compare it with rules by information alone.

    Args:
        method: with the budget of each prompt.
        parts: the prompts that are tuned on. A calibrated rule is fitted to all parts but one to be compared
            on that one, in turn, and at the end to all.
    """
    rules: dict[str, Rule] = {_name(power): InformationRule(power) for power in POWERS}
    asked: dict[str, list[Rule]] = {label: [rule] * len(parts) for label, rule in rules.items()}
    tokens, observed = _observe(method, parts, ask)
    fewest = min(sum(len(own.signals) for own in _without(observed, i)) for i in range(len(parts)))
    if fewest >= FEWEST_ROWS:
        asked[CALIBRATED] = [_fit(_without(observed, i), tokens) for i in range(len(parts))]
        rules[CALIBRATED] = _fit(observed, tokens)
    values = {
        label: Scores.join([ask(shared(method, rule), i) for i, rule in enumerate(own)]).value
        for label, own in asked.items()
    }
    return Rules(rules, values)


def _observe(
    method: AutoPrune, parts: Sequence[Examination], ask: Ask
) -> tuple[list[float], list[Observed]]:
    """The levels as mean tokens per open layer, and how each part's prompts answer at each of them.

    The first layers stay as they are at the budget that is tuned for: there a shared budget changes nothing.
    """
    observed = []
    for index, part in enumerate(parts):
        place = part.places
        agreement = np.zeros((len(place), len(LEVELS)))
        for turn in range(len(LEVELS)):
            found = ask(shared(method, TakingTurns(turn)), index).agreement
            agreement[np.arange(len(place)), (place + turn) % len(LEVELS)] = found
        observed.append(Observed(part.signals(method), agreement))
    own = float(np.mean([own.own_tokens for part in observed for own in part.signals]))
    return [level * own for level in LEVELS], observed


def _without(observed: Sequence[Observed], part: int) -> list[Observed]:
    return [own for index, own in enumerate(observed) if index != part]


def _fit(observed: Sequence[Observed], tokens: Sequence[float]) -> CalibratedRule:
    signals = [own for part in observed for own in part.signals]
    agreement = np.concatenate([part.agreement for part in observed])
    return CalibratedRule.fit(signals, tokens, agreement)


def _name(power: float) -> str:
    return f"information, power {power:g}"
