"""Vision-language models with decoders whose cache or attention is of another kind than Llama's."""

from __future__ import annotations

from typing import Any

from torch import nn

from tests import zoo
from tests.zoo_configs import EXPERTS, LATENT
from tests.zoo_families import FAMILIES, Family, internvl, llava, mistral3

# What each needs beside the sizes of the zoo.
DECODERS: dict[str, dict[str, Any]] = {
    "deepseek_v3": LATENT | EXPERTS,
    "mistral4": LATENT | EXPERTS,
    "glm4_moe_lite": LATENT | EXPERTS,
    "minicpm3": LATENT,
    "youtu": LATENT,
    "diffllama": {"num_key_value_heads": 4},
}


AROUND = {"llava": llava, "internvl": internvl, "mistral3": mistral3}


def build(kind: str, attn_implementation: str = "sdpa", family: str = "llava") -> nn.Module:
    """A tiny random model, for `zoo.inputs(family, ...)`."""
    return zoo.build_family(
        Family(
            lambda: AROUND[family](kind, **DECODERS[kind]),
            FAMILIES[family].model,
            FAMILIES[family].image,
        ),
        attn_implementation,
    )
