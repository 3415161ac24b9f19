"""Vision-language models with decoders whose cache or attention is of another kind than Llama's."""

from __future__ import annotations

from typing import Any

from torch import nn

from tests import zoo
from tests.zoo_families import FAMILIES, Family, internvl, llava, mistral3

LATENT = {
    "num_key_value_heads": zoo.HEADS,
    "head_dim": 8,
    "kv_lora_rank": 24,
    "q_lora_rank": 32,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 12,
}
EXPERTS = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "n_group": 1,
    "topk_group": 1,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
}
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
