"""Which models the plugin prunes, and how a model is asked for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .settings import KEY, Settings


@dataclass(frozen=True)
class Family:
    """One family of models.

    name: what people call it.
    architecture: the name under which vLLM knows its pruned class.
    path: where that class is, as vLLM imports it.
    plain_rope: whether a position is one number; if not, it is three (M-RoPE).
    """

    name: str
    architecture: str
    path: str
    plain_rope: bool = True


# By the model type of a configuration.
FAMILIES: dict[str, Family] = {
    "llava": Family("LLaVA-1.5", "AutoPruneLlava", "autoprune_vllm.llava:AutoPruneLlava"),
    "llava_next": Family(
        "LLaVA-NeXT", "AutoPruneLlavaNext", "autoprune_vllm.llava_next:AutoPruneLlavaNext"
    ),
    "qwen2_5_vl": Family(
        "Qwen2.5-VL",
        "AutoPruneQwen2_5_VL",
        "autoprune_vllm.qwen2_5_vl:AutoPruneQwen2_5_VL",
        plain_rope=False,
    ),
    "qwen3_vl": Family(
        "Qwen3-VL",
        "AutoPruneQwen3VL",
        "autoprune_vllm.qwen3_vl:AutoPruneQwen3VL",
        plain_rope=False,
    ),
    "internvl": Family(
        "InternVL", "AutoPruneInternVL", "autoprune_vllm.internvl:AutoPruneInternVL"
    ),
}


def family_of(config: Any) -> Family:
    """The family of a model by its configuration.

    Raises:
        ValueError: it is none that the plugin prunes; the message names those that are.
    """
    kind = getattr(config, "model_type", None)
    if kind not in FAMILIES:
        known = ", ".join(f"{family.name} ({name})" for name, family in FAMILIES.items())
        raise ValueError(
            f"autoprune-vllm does not prune models of type {kind!r}; it prunes {known}. With transformers, "
            "autoprune prunes more: see `autoprune families`"
        )
    tower = getattr(getattr(config, "vision_config", None), "model_type", "")
    if kind in ("llava", "llava_next") and tower != "clip_vision_model":
        raise ValueError(
            f"autoprune-vllm prunes {FAMILIES[kind].name} with a CLIP vision tower, and this model's is "
            f"{tower!r}; leave the architecture out of --hf-overrides to serve it unpruned"
        )
    return FAMILIES[kind]


def overrides(
    model: str,
    method: str = "fastervlm",
    budget: int | None = None,
    ratio: float | None = None,
    options: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """What to give vLLM as `hf_overrides` so that it prunes this model.

    Args:
        model: a folder or a name on the hub; its configuration is read.
        method: name of a method that cuts before the decoder.
        budget: visual tokens of each picture; a smaller picture stays whole.
        ratio: instead of a budget, the share of each picture's tokens. Neither: pictures stay whole, except
            where a request gives a budget.
        options: other settings of the method.

    Raises:
        ValueError: the model, the method or a setting is none that the plugin takes.
    """
    from transformers import AutoConfig

    given = {"method": method, "budget": budget, "ratio": ratio, "options": dict(options or {})}
    setting = {name: value for name, value in given.items() if value not in (None, {})}
    Settings.of(setting)
    family = family_of(AutoConfig.from_pretrained(model))
    return {"architectures": [family.architecture], KEY: setting}
