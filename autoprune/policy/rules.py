"""Rules of who gets how much: from what was measured of a prompt to what it loses at each number of tokens.

A rule is called with the prompts' `Signals` and with candidate numbers of tokens, and answers with a table:
the loss that it predicts for each prompt at each of them. Any function of that form is a rule. Numbers of
tokens are means over the layers that are still open, those behind `mi_layer`.
"""

from __future__ import annotations

import hashlib
import json
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .regression import logistic_regression

Floats = NDArray[np.float64]

LEAST_BITS = 0.1
"""Less information than this counts as so much: a prompt of 0 bits would ask for everything."""

FEWEST_ROWS = 100
"""Prompts below which a calibrated rule is refused: from 50 it does worse than no rule."""

QUESTION = 64
"""Numbers that say what a question is about."""

ENOUGH_ROWS = 400
"""Prompts below which a calibrated rule warns that half of its gain may be missing."""


@dataclass(frozen=True)
class Signals:
    """What is known of a prompt when its budget is set, after layer `mi_layer`.

    Attributes:
        information: mutual information between text and visual tokens, bits.
        participation: over how many visual tokens the text's attention is spread: 1 / sum p^2 of its mean
            p over text rows and heads, tokens.
        entropy: of the same p, bits.
        num_visual: N, tokens; num_text: the other tokens of the prompt.
        own_tokens: the mean number of visual tokens that its own allowance pays for in the layers behind
            `mi_layer`.
        question: what the text behind the picture is about, so that a rule can tell one kind of question from
            another: the mean of its hidden states behind `mi_layer`, shrunk to `QUESTION` numbers. They mean
            something to one model only. Empty where they were not measured.
    """

    information: float
    participation: float
    entropy: float
    num_visual: int
    num_text: int
    own_tokens: float
    question: tuple[float, ...] = ()


_MEASURED = 5  # features beside the question

Rule = Callable[[Sequence[Signals], Floats], ArrayLike]
"""(signals of P prompts, ascending mean visual tokens per open layer [C]) -> predicted loss [P, C].

Only differences within a row matter, and all rows are in the same unit.
"""


@dataclass(frozen=True)
class InformationRule:
    """More information, fewer tokens: a prompt wants own_tokens / information^power.

    It predicts a loss of -w log(tokens) with that w, under which the best shares of a sum are proportional to
    w. Only ratios of information matter, so its scale, which differs between models, does not.

    Args:
        power: 1 gives a prompt of twice the information half the tokens in the open layers; 0 gives every
            prompt what it gets alone.
    """

    power: float = 1.0

    def __post_init__(self) -> None:
        if not (_is_number(self.power) and 0 <= self.power <= 100):
            raise ValueError(f"power must be a number from 0 to 100, got {self.power!r}")

    def __call__(self, signals: Sequence[Signals], tokens: Floats) -> Floats:
        bits = np.array([max(s.information, LEAST_BITS) for s in signals])
        own = np.array([s.own_tokens for s in signals])
        # Relative to the most informative prompt that is possible, so that no power overflows.
        wanted = own * (bits / LEAST_BITS) ** -self.power
        return -wanted[:, None] * np.log(tokens)

    def to_dict(self) -> dict[str, Any]:
        return {"kind": "information", "power": self.power}


@dataclass(frozen=True)
class CalibratedRule:
    """What the signals of a model's prompts say of how often a budget changes its answer.

    For each of a few budgets a logistic regression on standardised signals predicts the chance that the
    answer differs from the one at a large budget. More tokens are never predicted to be worse, and without
    any token every answer differs. `fit` makes one from prompts without labels.

    Args:
        tokens: of the B budgets, ascending: mean visual tokens per open layer.
        mean, scale: of each of the F features of `features`.
        weights: `[B, 1 + F]`, the constant first.
    """

    tokens: tuple[float, ...]
    mean: tuple[float, ...]
    scale: tuple[float, ...]
    weights: tuple[tuple[float, ...], ...]

    def __post_init__(self) -> None:
        number = len(self.mean)
        shapes = (number, len(self.scale), *(len(row) - 1 for row in self.weights))
        if len(self.tokens) != len(self.weights) or len(set(shapes)) > 1 or number < _MEASURED:
            raise ValueError(
                f"a calibrated rule has a mean and a scale of {_MEASURED} features or more, and for each of "
                f"its budgets a weight of each and a constant, got {len(self.tokens)} budgets and numbers of "
                f"{list(shapes)}"
            )
        numbers = [*self.tokens, *self.mean, *self.scale, *(w for row in self.weights for w in row)]
        if not all(map(_is_number, numbers)) or min(self.scale) <= 0:
            raise ValueError(
                "a calibrated rule holds finite numbers, its scales above 0; fit it anew"
            )
        _check_tokens(self.tokens)

    def __call__(self, signals: Sequence[Signals], tokens: Floats) -> Floats:
        found = features(signals)
        if len(signals) and found.shape[1] != len(self.mean):
            raise ValueError(
                f"this rule looks at {len(self.mean)} features of a prompt, got {found.shape[1]}; fit it anew "
                "on signals of this release and this model"
            )
        seen = (found.reshape(-1, len(self.mean)) - self.mean) / self.scale
        # Far from what it was fitted on, a straight line would say anything.
        seen = np.clip(seen, -3, 3)
        weights = np.array(self.weights)
        chance = 1 / (1 + np.exp(-(weights[:, 0] + seen @ weights[:, 1:].T)))
        falling = np.minimum.accumulate(chance, axis=1)
        # Below the smallest budget nothing was measured. Were it free, the easiest prompts would lose all.
        nodes, lost = (0.0, *self.tokens), np.ones((len(falling), 1))
        return np.array(
            [np.interp(tokens, nodes, row) for row in np.concatenate((lost, falling), axis=1)]
        )

    @classmethod
    def fit(
        cls,
        signals: Sequence[Signals],
        tokens: Sequence[float],
        agreement: ArrayLike,
        ridge: float = 30.0,
    ) -> CalibratedRule:
        """A rule from prompts without labels.

        Args:
            signals: of each of P prompts, measured at the budget that the rule is for.
            tokens: of the B budgets that were tried, ascending: mean visual tokens per open layer, which
                `Signals.own_tokens` says of a prompt at each of them.
            agreement: `[P, B]`, from 0 to 1: whether the answer at each budget is that at a larger one.
            ridge: weight of the squared coefficients against the sum of the log losses.

        Raises:
            ValueError: fewer than 100 prompts, or numbers that do not fit.
        """
        rows = len(signals)
        if rows < FEWEST_ROWS:
            raise ValueError(
                f"a calibrated rule needs {FEWEST_ROWS} prompts or more, got {rows}; from fewer it does worse "
                "than no rule"
            )
        if rows < ENOUGH_ROWS:
            warnings.warn(
                f"{rows} prompts are few for a calibrated rule; about half of its gain needs {ENOUGH_ROWS}",
                stacklevel=2,
            )
        agreed = np.asarray(agreement, dtype=np.float64)
        if agreed.shape != (rows, len(tokens)) or not ((agreed >= 0) & (agreed <= 1)).all():
            raise ValueError(
                f"agreement must be [{rows} prompts, {len(tokens)} budgets] from 0 to 1, got "
                f"{list(agreed.shape)}"
            )
        if not (_is_number(ridge) and ridge > 0):
            raise ValueError(f"ridge must be a number above 0, got {ridge!r}")
        _check_tokens(tokens)
        seen = features(signals)
        mean, spread = seen.mean(axis=0), seen.std(axis=0)
        # A feature that never varies tells nothing, and its weight stays 0.
        scale = np.where(spread > 1e-9 * (1 + np.abs(mean)), spread, 1.0)
        design = np.column_stack((np.ones(rows), np.clip((seen - mean) / scale, -3, 3)))
        weights = [logistic_regression(design, 1 - column, ridge) for column in agreed.T]
        return cls(
            tuple(map(float, tokens)),
            tuple(mean.tolist()),
            tuple(scale.tolist()),
            tuple(tuple(row.tolist()) for row in weights),
        )

    def __repr__(self) -> str:
        """Short, and another one for every other rule."""
        digest = hashlib.sha256(json.dumps(self.to_dict()).encode()).hexdigest()[:12]
        return f"<CalibratedRule of {len(self.tokens)} budgets and {len(self.mean)} features, {digest}>"

    def to_dict(self) -> dict[str, Any]:
        return {"kind": "calibrated", **asdict(self)}


def features(signals: Sequence[Signals]) -> Floats:
    """What a calibrated rule looks at, [prompts, features]: numbers of tokens as logarithms to base 2, and
    what the question is about.

    Raises:
        ValueError: the question is described by more numbers for one prompt than for another.
    """
    lengths = {len(s.question) for s in signals}
    if len(lengths) > 1:
        raise ValueError(
            f"the questions of all prompts are described by as many numbers, got {sorted(lengths)}; measure "
            "all prompts on one model"
        )
    rows = [
        (
            s.information,
            math.log2(max(s.participation, 1.0)),
            s.entropy,
            math.log2(max(s.num_visual, 1)),
            math.log2(1 + s.num_text),
            *s.question,
        )
        for s in signals
    ]
    return np.array(rows, dtype=np.float64).reshape(len(rows), -1 if rows else _MEASURED)


def rule_from_dict(saved: Any) -> Rule:
    """A rule that `to_dict` has written.

    Raises:
        ValueError: it is none.
    """
    kind = saved.get("kind") if isinstance(saved, Mapping) else None
    if kind not in ("information", "calibrated"):
        raise ValueError(f"a saved rule is of kind information or calibrated, got {kind!r}")
    made: type[InformationRule] | type[CalibratedRule]
    made = InformationRule if kind == "information" else CalibratedRule
    names = {field.name for field in fields(made)}
    if set(saved) - {"kind"} != names:
        raise ValueError(
            f"a saved {kind} rule has {sorted(names)}, got {sorted(set(saved) - {'kind'})}"
        )
    try:
        return made(**{name: _as_tuples(saved[name]) for name in names})
    except TypeError:
        raise ValueError(
            f"a saved {kind} rule holds lists of numbers, got {dict(saved)!r}"
        ) from None


def predicted(rule: Rule, signals: Sequence[Signals], tokens: Floats) -> Floats:
    """The table of a rule, [prompts, candidates].

    Raises:
        ValueError: what it gives is no such table of finite numbers.
    """
    given, expected = rule(signals, tokens), [len(signals), len(tokens)]
    try:
        table = np.asarray(given, dtype=np.float64)
    except (TypeError, ValueError):
        table = None
    if table is None or list(table.shape) != expected:
        found = f"a {type(given).__name__}" if table is None else f"shape {list(table.shape)}"
        raise ValueError(
            "a fleet's rule must give each prompt's loss at each number of tokens, here numbers of shape "
            f"{expected}, got {found}"
        )
    if not np.isfinite(table).all():
        prompt = int(np.argmin(np.isfinite(table).all(axis=1)))
        raise ValueError(
            f"a fleet's rule must give finite losses, got {table[prompt].tolist()[:8]} for prompt {prompt}, "
            f"{signals[prompt]}"
        )
    return table


def _check_tokens(tokens: Sequence[float]) -> None:
    """Raise ValueError unless these are budgets that a curve can be drawn through."""
    numbers = all(map(_is_number, tokens))
    if not numbers or len(tokens) < 2 or min(tokens) <= 0 or (np.diff(tokens) <= 0).any():
        raise ValueError(
            "a calibrated rule needs two or more ascending numbers of tokens above 0, got "
            f"{list(tokens)}"
        )


def _is_number(value: Any) -> bool:
    real = isinstance(value, (int, float, np.number)) and not isinstance(value, bool)
    return real and math.isfinite(float(value))


def _as_tuples(value: Any) -> Any:
    return tuple(map(_as_tuples, value)) if isinstance(value, list) else value
