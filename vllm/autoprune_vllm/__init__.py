"""Visual token pruning as a plugin of vLLM: the pictures of a prompt take a budget of tokens.

vLLM finds `register` by its entry point in every process. A model is pruned only if it is asked for:

    from autoprune_vllm import overrides
    from vllm import LLM

    llm = LLM(model, hf_overrides=overrides(model, method="scope", budget=64))

Models that are not asked for stay vLLM's own.
"""

from __future__ import annotations

from .families import FAMILIES, overrides

__all__ = ["FAMILIES", "overrides", "register"]


def register() -> None:
    """Make the pruned models known to vLLM. It calls this in each of its processes."""
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    from .cpu_runner import mend_cpu_runner
    from .server_config import PrunedConfig

    for family in FAMILIES.values():
        ModelRegistry.register_model(family.architecture, family.path)
        MODELS_CONFIG_MAP[family.architecture] = PrunedConfig
    mend_cpu_runner()
