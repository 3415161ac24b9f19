"""What is searched: methods, and for each of them its options with their possible values.

To search one more option, add a line to `SPACE`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..methods import create, options_of
from ..methods.base import Method
from ..policy.budget import Budget

if TYPE_CHECKING:
    from optuna import Trial

_DIGITS = 3


@dataclass(frozen=True)
class Choice:
    """An option that takes one of a few values.

    when: other options, searched before, and their values with which this one means anything.
    """

    option: str
    values: tuple[Any, ...]
    when: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)

    def suggest(self, trial: Trial, name: str) -> Any:
        return trial.suggest_categorical(name, self.values)


@dataclass(frozen=True)
class Range:
    """An option that takes any number from `low` to `high`; `log` searches small ones more closely."""

    option: str
    low: float
    high: float
    log: bool = False
    when: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)

    def suggest(self, trial: Trial, name: str) -> float:
        return round(trial.suggest_float(name, self.low, self.high, log=self.log), _DIGITS)


Dimension = Choice | Range

SUMMARY = Choice("merger", (None, "summary"))
"""Of a method that drops tokens and does nothing else with them."""

SPACE: dict[str, tuple[Dimension, ...]] = {
    "autoprune": (
        Choice("first_cut", ("after_layer_0", "pre_llm", "peek")),
        Choice(
            "first_ranking",
            (None, "text", "text+vision", "text+diversity"),
            when={"first_cut": ("after_layer_0", "peek")},
        ),
        Choice(
            "merger",
            (
                None,
                "dpc_knn",
                "summary",
                "summary strength=0.5",
                "summary strength=0",
                "summary norm=typical",
                "summary position=last",
            ),
        ),
        Range("k0", 0.05, 1.6, log=True),
        Range("gamma", 0.0, 1.0),
        Range("x0", 2.0, 24.0),
        Range("beta", 0.0, 2.0),
        Choice("mi_layer", (1, 2, 3)),
        Choice("rank_every", (1, 8, 16)),
        Choice("cut_every", (1, 2, 4, 8)),
    ),
    "fastv": (Choice("layer", (1, 2, 3, 6)), SUMMARY),
    "pdrop": (SUMMARY,),
    "divprune": (SUMMARY,),
    "scope": (SUMMARY,),
    "cdpruner": (Choice("negative", (False, True)), SUMMARY),
    "uniform": (SUMMARY,),
}
"""Options of each method that is tried, in the order in which they are decided."""

STARTS: tuple[Mapping[str, Any], ...] = (
    {"first_cut": "pre_llm"},
    {"first_cut": "peek"},
    {"merger": "summary"},
    {"first_cut": "peek", "merger": "summary"},
    {"first_cut": "peek", "first_ranking": "text+diversity", "merger": "summary"},
    {"first_cut": "peek", "first_ranking": "text+diversity", "merger": "summary", "x0": 9.0},
    {
        **{"first_cut": "peek", "first_ranking": "text+diversity", "merger": "summary"},
        **{"gamma": 0.05, "x0": 12.0, "beta": 0.8, "mi_layer": 2, "rank_every": 1},
    },
)
"""Settings of AutoPrune that are tried first, behind the defaults of every method."""

Candidate = dict[str, Any]
"""Values by the name of their parameter: "method", "autoprune.k0"."""


@dataclass(frozen=True)
class Space:
    """The part of `SPACE` that is searched, at one budget."""

    budget: Budget
    dimensions: Mapping[str, tuple[Dimension, ...]]

    @classmethod
    def of(cls, budget: Budget, methods: Sequence[str] = tuple(SPACE)) -> Space:
        """What is searched of these methods.

        Raises:
            ValueError: a method is not in `SPACE`.
        """
        unknown = [name for name in methods if name not in SPACE]
        if unknown or not methods:
            given = ", ".join(map(repr, unknown)) or "none"
            raise ValueError(f"methods to tune are some of {', '.join(SPACE)}, got {given}")
        return cls(budget, {name: SPACE[name] for name in methods})

    def suggest(self, trial: Trial) -> Candidate:
        """The values of the next trial, as optuna proposes them."""
        name = trial.suggest_categorical("method", list(self.dimensions))
        chosen: Candidate = {"method": name}
        for dimension in self.dimensions[name]:
            if _applies(dimension, name, chosen):
                parameter = f"{name}.{dimension.option}"
                chosen[parameter] = dimension.suggest(trial, parameter)
        return chosen

    def starts(self) -> list[Candidate]:
        """The defaults of every method, then `STARTS`."""
        found = [self._default(name) for name in self.dimensions]
        for changes in STARTS if "autoprune" in self.dimensions else ():
            changed = {f"autoprune.{option}": value for option, value in changes.items()}
            found.append(self._default("autoprune", changed))
        return found

    def build(self, candidate: Candidate) -> Method:
        """The method of a candidate.

        Raises:
            ValueError: its values do not go together.
        """
        name = candidate["method"]
        options = {
            parameter.partition(".")[2]: value
            for parameter, value in candidate.items()
            if parameter.startswith(f"{name}.")
        }
        return create(name, self.budget, **options)

    def _default(self, name: str, changed: Mapping[str, Any] | None = None) -> Candidate:
        """The method's own values where they are searched, and those that are changed."""
        chosen: Candidate = {"method": name}
        options = options_of(name)
        for dimension in self.dimensions[name]:
            # A changed value decides whether those behind it apply.
            if _applies(dimension, name, chosen):
                parameter = f"{name}.{dimension.option}"
                own = options[dimension.option].default
                chosen[parameter] = (changed or {}).get(parameter, own)
        return chosen


def _applies(dimension: Dimension, name: str, chosen: Candidate) -> bool:
    return all(chosen.get(f"{name}.{other}") in values for other, values in dimension.when.items())
