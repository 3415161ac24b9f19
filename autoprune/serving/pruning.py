"""Which method prunes a request, and whether its budget can be met."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import replace
from threading import Lock
from typing import Any

from ..contract import ModelShape
from ..methods.autoprune import AutoPrune
from ..methods.base import Method, Planned
from ..policy.budget import Budget, InfeasibleBudget
from .errors import RequestError
from .fields import shown
from .prompt import Prompt
from .request import Pruning

_REMEMBERED = 4096


class Allowed:
    """The methods that requests may choose from.

    Args:
        methods: by name, each with the server's budget; the first one is the default.
        shape: of the model.
    """

    def __init__(self, methods: Mapping[str, Method], shape: ModelShape) -> None:
        if not methods:
            raise ValueError("a server needs at least one method")
        self.methods, self._shape = dict(methods), shape
        self.default = next(iter(self.methods))
        self._feasible: OrderedDict[Any, None] = OrderedDict()
        self._lock = Lock()

    def choose(self, pruning: Pruning) -> tuple[str, Method]:
        """The method of a request with its budget, and its name.

        Raises:
            RequestError: this server does not allow it, or it cannot have such a budget.
        """
        name = pruning.method or self.default
        if name not in self.methods:
            listed = ", ".join(self.methods)
            raise RequestError(
                f"autoprune.method {shown(name)} is not allowed on this server; there are {listed}",
                param="autoprune.method",
            )
        method: Any = self.methods[name]
        if pruning.budget is None:
            return name, method
        try:
            return name, replace(method, budget=pruning.budget)
        except ValueError as error:
            raise RequestError(str(error), param="autoprune") from error

    def check(self, name: str, method: Method, prompt: Prompt) -> None:
        """Raise RequestError unless the budget can be met for this prompt."""
        if not prompt.num_visual:
            return
        key = (name, method.budget, prompt.num_visual, prompt.num_text)
        with self._lock:
            if key in self._feasible:
                return
        size = (self._shape.num_layers, prompt.num_visual)
        try:
            if isinstance(method, AutoPrune):
                method.plan(*size, 0.0, prompt.num_text, self._shape.cost)
            elif isinstance(method, Planned):
                method.plan(*size, prompt.num_text, self._shape.cost)
        except InfeasibleBudget as error:
            raise infeasible(error) from error
        with self._lock:
            self._feasible[key] = None
            if len(self._feasible) > _REMEMBERED:
                self._feasible.popitem(last=False)


def infeasible(error: InfeasibleBudget) -> RequestError:
    """The refusal of a budget, in the words of a request."""
    smallest = (
        ""
        if error.smallest is None
        else f'; the smallest is "autoprune": {field_of(error.smallest)}'
    )
    return RequestError(
        f"this prompt cannot be answered with {error.asked}{smallest}", param="autoprune"
    )


def field_of(budget: Budget) -> str:
    """A budget as a request states it."""
    name = "budget" if budget.kind == "tokens" else budget.kind
    return f'{{"{name}": {budget.value:.10g}}}'
