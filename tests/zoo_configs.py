"""What tiny configurations are made of: decoders, towers, and both together."""

from __future__ import annotations

from typing import Any

import transformers

from tests.zoo_pictures import (
    BOS,
    END,
    GRID_PATCH,
    HEAD_DIM,
    HEADS,
    HIDDEN,
    IMAGE,
    LAYERS,
    PAD,
    START,
    VIDEO,
    VOCABULARY,
)

# Sizes of attention that caches a latent instead of keys and values, and of a mixture of experts.
LATENT = {
    "num_key_value_heads": HEADS,
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


def text(kind: str, **changes: Any) -> dict[str, Any]:
    base = {
        "model_type": kind,
        "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN,
        "intermediate_size": 96,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": 2,
        "head_dim": HEAD_DIM,
        "max_position_embeddings": 512,
        "pad_token_id": PAD,
        "bos_token_id": BOS,
        "eos_token_id": None,
        "tie_word_embeddings": False,
    }
    return base | changes


def tower(kind: str, **changes: Any) -> dict[str, Any]:
    base = {
        "model_type": kind,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "image_size": 56,
        "patch_size": 14,
    }
    return base | changes


def config(cls: str, **fields: Any) -> transformers.PretrainedConfig:
    return getattr(transformers, cls)(tie_word_embeddings=False, **fields)


def qwen(
    cls: str,
    kind: str,
    sections: list[int],
    vision: dict[str, Any],
    text_changes: dict[str, Any] | None = None,
    **changes: Any,
) -> Any:
    """Of the families whose towers take patches, and grids of them: Qwen-VL and GLM-V."""
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": sections}
    if cls.startswith("Glm"):
        tokens = {"image_start_token_id": START, "image_end_token_id": END}
        rope["partial_rotary_factor"] = 0.5
    else:
        tokens = {"vision_start_token_id": START, "vision_end_token_id": END}
    tower = {
        "depth": 4,
        "num_heads": 2,
        "patch_size": GRID_PATCH,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "in_channels": 3,
    }
    return config(
        cls,
        text_config=text(kind, rope_parameters=rope, **text_changes or {}),
        vision_config=tower | vision,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        **tokens,
        **changes,
    )
