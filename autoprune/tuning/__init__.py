"""The best settings for a model at a budget, found on prompts without labels.

from autoprune import Budget, tiny
from autoprune.tuning import Options, built_in_prompts, tune

result = tune(*tiny.load(), built_in_prompts(800), Budget.tokens(16), Path("tuning"))
result.file.write(Path("tuned.json"))
"""

from .prompts import built_in_prompts, folder_prompts
from .result import Result
from .tuning import Options, tune

__all__ = ["Options", "Result", "built_in_prompts", "folder_prompts", "tune"]
