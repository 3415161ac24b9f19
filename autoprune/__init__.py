"""AutoPrune: complexity-adaptive visual token pruning for vision-language models, under an exact budget.

with autoprune.AutoPrune(budget=64)(model) as trace:
    ids = model.generate(**inputs)
"""

from .budget import Budget, InfeasibleBudget
from .cost import DecoderCost
from .errors import UnsupportedError
from .method import Method
from .methods import create, list_methods
from .methods.autoprune import AutoPrune
from .methods.autoprune_reference import AutoPruneReference

__version__ = "0.1.0"
__all__ = [
    "AutoPrune",
    "AutoPruneReference",
    "Budget",
    "DecoderCost",
    "InfeasibleBudget",
    "Method",
    "UnsupportedError",
    "create",
    "list_methods",
]
