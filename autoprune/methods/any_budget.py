"""The setting that every method has: its budget."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ..policy.budget import Budget, Counted


class AnyBudget:
    """A field of a method that takes a `Budget` or a number, and holds a `Budget`.

    `budget: AnyBudget = AnyBudget(64)` in the method's class; then `self.budget` is a `Budget`. A dataclass
    lets such a descriptor set and get its field.

    Args:
        default: what the budget is if none is given.
        counted: how a number is counted, see `Budget.tokens`.

    Raises:
        ValueError: what is given is neither, see `Budget.of`; or a budget over several prompts, and the method
            gives every prompt the same.
    """

    def __init__(self, default: float, counted: Counted = "entering") -> None:
        self.default, self.counted = Budget.tokens(default, counted), counted

    def __get__(self, method: Any, owner: type) -> Budget:
        if method is None:
            return self.default
        held: Budget = vars(method)["budget"]
        return held

    # `Any` instead of float: mypy takes this type for what is read, too, in a class derived from the method.
    def __set__(self, method: Any, value: Budget | Any) -> None:
        budget = Budget.of(value, self.counted)
        if budget.over != "prompt" and not method.shares_budgets:
            alone = replace(budget, over="prompt").expression
            raise ValueError(
                f"{method.name} gives every prompt the same budget, got {budget.expression}; use {alone}, or "
                "autoprune, which shares a budget over prompts"
            )
        vars(method)["budget"] = budget
