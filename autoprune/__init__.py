"""AutoPrune: complexity-adaptive visual token pruning for vision-language models, under an exact budget.

with autoprune.AutoPrune(budget=64)(model) as trace:
    ids = model.generate(**inputs)
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .engine.attach import detach
    from .errors import UnsupportedError
    from .methods import create, list_methods, load_method
    from .methods.autoprune import AutoPrune
    from .methods.autoprune_reference import AutoPruneReference
    from .methods.base import Method
    from .methods.per_prompt import per_prompt
    from .policy.budget import Budget, InfeasibleBudget
    from .policy.cost import DecoderCost
    from .policy.fleet import Fleet

__version__ = "0.1.0"
__all__ = [
    "AutoPrune",
    "AutoPruneReference",
    "Budget",
    "DecoderCost",
    "Fleet",
    "InfeasibleBudget",
    "Method",
    "SummaryToken",
    "UnsupportedError",
    "create",
    "detach",
    "list_methods",
    "load_method",
    "per_prompt",
]

# Where a name comes from. It is imported when it is first used: torch takes seconds, and
# `autoprune --help` needs none of it.
_HOMES = {
    "AutoPrune": "methods.autoprune",
    "AutoPruneReference": "methods.autoprune_reference",
    "Budget": "policy.budget",
    "DecoderCost": "policy.cost",
    "Fleet": "policy.fleet",
    "InfeasibleBudget": "policy.budget",
    "Method": "methods.base",
    "SummaryToken": "contract",
    "UnsupportedError": "errors",
    "create": "methods",
    "detach": "engine.attach",
    "list_methods": "methods",
    "load_method": "methods",
    "per_prompt": "methods.per_prompt",
}


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is not None:
        return getattr(importlib.import_module(f".{home}", __name__), name)
    try:
        return importlib.import_module(f".{name}", __name__)
    except ModuleNotFoundError as error:
        if error.name != f"{__name__}.{name}":
            raise
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}") from None


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
