"""AutoPrune: complexity-adaptive visual token pruning for vision-language models, under an exact budget.

with autoprune.AutoPrune(budget=64)(model) as trace:
    ids = model.generate(**inputs)
"""

from .budget import Budget
from .method import detach
from .methods import create, list_methods
from .methods.autoprune import AutoPrune
from .methods.autoprune_reference import AutoPruneReference
from .methods.per_prompt import per_prompt

__version__ = "0.1.0"
__all__ = [
    "AutoPrune",
    "AutoPruneReference",
    "Budget",
    "create",
    "detach",
    "list_methods",
    "per_prompt",
]
