"""By which rule a batch shares its budget: fitted to a method whose settings are found, without labels."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..evaluation.answering import Refused
from ..methods.autoprune import AutoPrune
from ..policy.budget import Budget
from ..policy.cost import DecoderCost
from ..policy.fleet import Fleet
from ..policy.rules import FEWEST_ROWS, CalibratedRule, InformationRule, Rule, Signals
from .agreement import Scores
from .examination import Examination

FACTORS = (0.5, 0.75, 1.0, 1.5, 2.0, 4.0)
"""Budgets at which answers are compared with the plain model's, as multiples of the one that is tuned for."""
POWERS = (0.5, 1.0, 2.0)
"""Of the information rules that are tried."""
CALIBRATED = "calibrated"
RULES = len(POWERS) + 1
STEPS = len(FACTORS) + RULES
"""How often all prompts that are tuned on are asked."""

Ask = Callable[[AutoPrune, int], Scores]
"""What a method scores on one part of the prompts. Raises Refused where it cannot run."""


@dataclass(frozen=True)
class Observed:
    """What is known of the prompts of one part. signals: at the budget that is tuned for.

    agreement: [prompts, budgets], with the plain model's answers.
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


def shared(method: AutoPrune, rule: Rule) -> AutoPrune:
    """The same method with its budget over a batch."""
    budget = dataclasses.replace(method.budget, over="batch")
    return dataclasses.replace(method, budget=budget, fleet=Fleet(rule))


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
    if len(tokens) > 1 and fewest >= FEWEST_ROWS:
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
    """The budgets that can run, as mean tokens per open layer, and what is known of each part's prompts."""
    signals = [part.signals(method) for part in parts]
    every = [own for part in signals for own in part]
    tokens: list[float] = []
    columns: list[list[NDArray[np.float64]]] = [[] for _ in parts]
    for factor in FACTORS:
        scaled = _scaled(method, factor)
        if scaled is None:
            continue
        try:
            found = [ask(scaled, i).agreement for i in range(len(parts))]
        except Refused:
            continue
        open_tokens = _open_tokens(scaled, every, parts[0].model)
        if tokens and open_tokens <= tokens[-1]:
            # Everything is kept already.
            break
        tokens.append(open_tokens)
        for column, own in zip(columns, found, strict=True):
            column.append(own)
    return tokens, [
        Observed(own, np.stack(column, axis=1) if column else np.zeros((len(own), 0)))
        for own, column in zip(signals, columns, strict=True)
    ]


def _scaled(method: AutoPrune, factor: float) -> AutoPrune | None:
    """The method at a multiple of its budget; None where that is more than the whole."""
    budget = method.budget
    value = factor * budget.value
    if budget.kind in ("ratio", "flops") and value > 1:
        return None
    if budget.kind == "kv_bytes":
        value = round(value)
    return dataclasses.replace(method, budget=Budget(budget.kind, value))


def _open_tokens(method: AutoPrune, signals: Sequence[Signals], model: Any) -> float:
    """Mean visual tokens in the layers behind `mi_layer`, over all prompts."""
    config = model.config.get_text_config()
    cost = None if method.budget.exact else DecoderCost.from_config(config, model.dtype.itemsize)
    sizes = [(own.num_visual, own.num_text) for own in signals]
    means = {
        (visual, text): np.mean(
            method.plan(config.num_hidden_layers, visual, 0.0, text, cost)[method.mi_layer + 1 :]
        )
        for visual, text in set(sizes)
    }
    return float(np.mean([means[size] for size in sizes]))


def _without(observed: Sequence[Observed], part: int) -> list[Observed]:
    return [own for index, own in enumerate(observed) if index != part]


def _fit(observed: Sequence[Observed], tokens: Sequence[float]) -> CalibratedRule:
    signals = [own for part in observed for own in part.signals]
    agreement = np.concatenate([part.agreement for part in observed])
    return CalibratedRule.fit(signals, tokens, agreement)


def _name(power: float) -> str:
    return f"information, power {power:g}"
