"""A budget over a stream of prompts: what has been saved, and who may spend it."""

from __future__ import annotations

import json
import math
import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..files import write_whole
from .budget import Budget
from .demand import Demand
from .rules import InformationRule, Rule, rule_from_dict

Ints = NDArray[np.int64]

VERSION = 1
"""Of the file that `Fleet.save` writes."""

PRICE_STEP = 0.1
"""How much one prompt that spends twice its allowance moves a stream's price, as a share.

A smaller step shares better in a long stream of mixed prompts. But it leaves much unspent in a short one, and
does worse than no sharing where easy prompts come last.
"""

PRICE_RANGE = (1 / 64, 64.0)
"""A price further off would take long to come back."""


@dataclass(frozen=True)
class FleetState:
    """What a fleet has seen, at one moment.

    Attributes:
        prompts: that are finished; copies of a prompt, as for beams, count each.
        allowed, spent: their sums, in the budget's unit: tokens over all layers, FLOPs or bytes.
        bank: what later prompts may spend beside their own allowance. It is allowed - spent, less what
            prompts hold that are under way.
        price: against the mean price at which prompts took their own allowance; 1 at first.
    """

    prompts: int = 0
    allowed: int = 0
    spent: int = 0
    bank: int = 0
    price: float = 1.0


class Fleet:
    """The state of a stream of prompts that share one budget, and the rule of who gets how much.

    `AutoPrune(Budget.tokens(4, over="stream"), fleet=Fleet())`. A prompt that is predicted to need little
    leaves a part of its allowance in a bank, and a later one may spend it. The bank is never negative. What a
    prompt takes is decided by a price: it spends as long as a token saves more loss than the price, which
    rises where prompts spend more than their allowance and falls where they spend less.

    One fleet serves one budget on one model, in as many threads and contexts as there are. Tokens are taken
    from the bank when a prompt is decided, and come into it when its prefill is done. A prefill that fails
    gives back what it took, and leaves nothing.

    Args:
        rule: "information" (`InformationRule()`: more information, fewer tokens), a `CalibratedRule`, or a
            function of that form, see `rules.Rule`.

    Raises:
        ValueError: the rule is none of these.
    """

    def __init__(self, rule: str | Rule = "information"):
        if rule == "information":
            rule = InformationRule()
        if not callable(rule):
            raise ValueError(
                'a fleet\'s rule must be "information", a CalibratedRule or a function of signals and tokens, '
                f"got {rule!r}"
            )
        self.rule: Rule = rule
        self._lock = threading.Lock()
        self._budget: Budget | None = None
        self._layers = 0
        self._state = FleetState()
        # Sum of the prices at which prompts, each counted once, would have taken their allowance.
        self._price_sum, self._priced = 0.0, 0

    def __repr__(self) -> str:
        """Of the settings alone: two runs with the same settings are written alike."""
        name = getattr(self.rule, "__name__", None) or repr(self.rule)
        return f"Fleet(rule={name})"

    @property
    def state(self) -> FleetState:
        """As it is now."""
        with self._lock:
            return self._state

    def plan(self, prompts: Demand) -> tuple[Ints, Booking]:
        """Schedules [prompts, L] within the allowances and the bank, and what they book.

        The booking must be settled, however the prefill ends.

        Raises:
            ValueError: the fleet serves another budget or model; the rule gives no table of losses.
        """
        curves = prompts.curves(self.rule)
        allowed, text = prompts.allowed.tolist(), prompts.without_visual.tolist()
        prices = [curve.price_at(own) for curve, own in zip(curves, allowed, strict=True)]
        with self._lock:
            self._refuse_another(prompts)
            bank, total, number = self._state.bank, self._price_sum, self._priced
            # The price moves within a batch as it would from prompt to prompt.
            shares, factor = [], self._state.price
            for curve, own, price, free in zip(curves, allowed, prices, text, strict=True):
                total, number = total + price, number + 1
                most = own + bank // prompts.copies
                share = curve.cheapest(factor * total / number, most, own)
                bank += prompts.copies * (own - share)
                factor = _moved(factor, (share - own) / max(own - free, 1))
                shares.append(share)
            held = max(self._state.bank - bank, 0)
            self._state = replace(self._state, bank=self._state.bank - held)
        try:
            plan = prompts.solve(np.array(shares, dtype=np.int64))
            return plan, Booking(prompts, prompts.spent(plan), held, prices)
        except BaseException:
            self._give_back(held)
            raise

    def settle(self, booking: Booking, done: bool) -> None:
        """Book what a prefill has spent, or with `done=False` give back what it held."""
        if not done:
            self._give_back(booking.held)
            return
        prompts, copies = booking.prompts, booking.prompts.copies
        own, spent = prompts.allowed, booking.spent
        pull = (spent - own) / np.maximum(own - prompts.without_visual, 1)
        with self._lock:
            old, price = self._state, self._state.price
            for each in pull.tolist():
                price = _moved(price, each)
            self._state = FleetState(
                prompts=old.prompts + copies * len(own),
                allowed=old.allowed + copies * sum(own.tolist()),
                spent=old.spent + copies * sum(spent.tolist()),
                bank=old.bank + booking.held + copies * sum((own - spent).tolist()),
                price=price,
            )
            self._price_sum += sum(booking.prices)
            self._priced += len(own)

    def _give_back(self, held: int) -> None:
        with self._lock:
            self._state = replace(self._state, bank=self._state.bank + held)

    def _refuse_another(self, prompts: Demand) -> None:
        """Take up the budget and the model of the first prompts; raise ValueError for others."""
        budget, layers = prompts.schedule.budget, prompts.sizes.num_layers
        if self._budget is None:
            self._budget, self._layers = budget, layers
        if (budget, layers) != (self._budget, self._layers):
            raise ValueError(
                f"this fleet serves {self._budget.expression} on a model of {self._layers} layers, got "
                f"{budget.expression} on one of {layers}; give each budget and model a Fleet of its own"
            )

    def rule_as_dict(self) -> dict[str, Any] | None:
        """The rule for JSON, as `rules.rule_from_dict` reads it; None if it is a function of the user's."""
        describe = getattr(self.rule, "to_dict", None)
        return describe() if callable(describe) else None

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the state and the rule as JSON; the file appears whole or not at all.

        What prompts under way hold is not in the saved bank. Of a function as the rule nothing is written.
        """
        rule = self.rule_as_dict()
        with self._lock:
            budget, state = self._budget, self._state
            record = {
                "autoprune_fleet": VERSION,
                "budget": None if budget is None else [budget.kind, budget.value],
                "layers": self._layers,
                "rule": rule,
                "prompts": state.prompts,
                "allowed": state.allowed,
                "spent": state.spent,
                "bank": state.bank,
                "price": state.price,
                "price_sum": self._price_sum,
                "priced": self._priced,
            }
        write_whole(path, json.dumps(record, indent=1) + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike[str], rule: Rule | None = None) -> Fleet:
        """A fleet that goes on where `save` was called.

        Args:
            rule: in the place of the saved one; needed where that was a function.

        Raises:
            ValueError: the file cannot be read, is no fleet's, is of another version, or holds numbers that
                no fleet can have.
        """
        record = _read(Path(path))
        if rule is None and record["rule"] is None:
            raise ValueError(
                f"{str(path)!r} was saved with a function as its rule, which a file cannot hold; pass it: "
                "Fleet.load(path, rule=...)"
            )
        fleet = cls(rule if rule is not None else rule_from_dict(record["rule"]))
        names = ("prompts", "allowed", "spent", "bank", "price")
        fleet._state = FleetState(**{name: record[name] for name in names})
        if record["budget"] is not None:
            kind, value = record["budget"]
            fleet._budget, fleet._layers = Budget(kind, value, over="stream"), record["layers"]
        fleet._price_sum, fleet._priced = float(record["price_sum"]), record["priced"]
        return fleet

    def __getstate__(self) -> dict[str, Any]:
        """Without the lock, which belongs to this process: a copy is a fleet of its own."""
        with self._lock:
            return self.__dict__ | {"_lock": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ = state | {"_lock": threading.Lock()}


@dataclass(frozen=True)
class Booking:
    """What one prefill takes from a fleet and will bring to it.

    spent: by each prompt's schedule, [prompts]. held: what was taken from the bank.
    prices: at which each prompt would have taken its own allowance.
    """

    prompts: Demand
    spent: Ints
    held: int
    prices: Sequence[float]


def _moved(price: float, pull: float) -> float:
    """The price after a prompt that spent so much more than its allowance, as a share of it."""
    moved = price * math.exp(min(PRICE_STEP * pull, 1.0))
    return min(max(moved, PRICE_RANGE[0]), PRICE_RANGE[1])


def _read(path: Path) -> dict[str, Any]:
    """A saved fleet, with every number checked."""
    try:
        record = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise ValueError(f"cannot read the fleet {str(path)!r}: {error.strerror}") from None
    except ValueError:
        record = None
    if not isinstance(record, dict) or "autoprune_fleet" not in record:
        raise ValueError(f"{str(path)!r} is no fleet; give a file that Fleet.save has written")
    if record["autoprune_fleet"] != VERSION:
        raise ValueError(
            f"{str(path)!r} is a fleet of version {record['autoprune_fleet']!r}, and version {VERSION} is "
            "what can be read; begin a new Fleet"
        )
    for name in ("layers", "prompts", "allowed", "spent", "bank", "priced"):
        value = record.get(name)
        if type(value) is not int or value < 0:
            raise ValueError(
                f"the fleet {str(path)!r} has {name} {value!r}, which must be a whole number from 0 on"
            )
    for name, least in (("price", PRICE_RANGE[0]), ("price_sum", 0.0)):
        number: Any = record.get(name)
        if type(number) not in (int, float) or not least <= number < math.inf:
            raise ValueError(
                f"the fleet {str(path)!r} has {name} {number!r}, which must be a number from {least} on"
            )
    if record["bank"] > record["allowed"] - record["spent"]:
        raise ValueError(
            f"the fleet {str(path)!r} has a bank of {record['bank']}, but its prompts have left "
            f"{record['allowed'] - record['spent']} of what they were allowed"
        )
    budget = record.get("budget")
    if budget is not None and not (isinstance(budget, list) and len(budget) == 2):
        raise ValueError(f"the fleet {str(path)!r} has no budget that can be read: {budget!r}")
    record.setdefault("rule", None)
    return record
