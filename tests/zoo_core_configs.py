"""The tiny configurations of the families in `zoo_core`."""

from __future__ import annotations

from typing import Any

import transformers

from tests.zoo_configs import EXPERTS, LATENT, config, qwen, text, tower
from tests.zoo_pictures import END, GRID_PATCH, HIDDEN, IMAGE, START, VIDEO, VOCABULARY

MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
MOE = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "decoder_sparse_step": 1,
}
QWEN_TOWER = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "out_hidden_size": HIDDEN,
}
DEEPSTACK = QWEN_TOWER | {"num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1, 2]}
GLM_TOWER = QWEN_TOWER | {"image_size": 32}
AUDIO = {
    "encoder_layers": 1,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "d_model": 32,
    "output_dim": HIDDEN,
    "num_mel_bins": 16,
}
SIGLIP = {"vision_use_head": False}


def omni(cls: str, name: str, vision: dict[str, Any], **changes: Any) -> Any:
    return qwen(
        cls, name, [2, 3, 3], vision, audio_config=AUDIO, text_changes=changes, audio_token_id=2
    )


def grid(cls: str, name: str, vision: dict[str, Any], **changes: Any) -> Any:
    return config(
        cls,
        text_config=text(name, **changes),
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "patch_size": GRID_PATCH,
        }
        | vision,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
    )


def paddleocr() -> Any:
    return grid("PaddleOCRVLConfig", "paddleocr_vl_text", {"image_size": 32}, rope_parameters=MROPE)


def video_llama() -> Any:
    return grid("VideoLlama3Config", "qwen2", {"model_type": "video_llama_3_vision"})


def cosmos() -> Any:
    made = grid(
        "Cosmos3EdgeConfig", "cosmos3_edge_text", {"num_patches": 16}, rope_parameters=MROPE
    )
    made.projector_hidden_size = 64
    made.vision_start_token_id, made.vision_end_token_id = START, END
    return made


def kimi() -> Any:
    made = grid(
        "Kimi_K25Config",
        "deepseek_v3",
        {"pos_emb_height": 8, "pos_emb_width": 8},
        **LATENT | EXPERTS,
    )
    made.projection_hidden_size = 32
    return made


def cohere2_vision() -> Any:
    return config(
        "Cohere2VisionConfig",
        text_config=text(
            "cohere2",
            sliding_window=12,
            layer_types=["sliding_attention", "sliding_attention", "full_attention"] * 2,
        ),
        vision_config=tower("siglip_vision_model", patch_size=7, **SIGLIP),
        image_token_id=IMAGE,
        alignment_intermediate_size=64,
    )


def ovis2() -> Any:
    return config(
        "Ovis2Config",
        text_config=text("qwen2"),
        vision_config=tower("ovis2_vision", vocab_size=40, hidden_stride=2, patch_size=7),
        image_token_id=IMAGE,
        visual_indicator_token_ids=[START, END, VIDEO, 2, 3],
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
    )


def lighton_ocr() -> Any:
    return config(
        "LightOnOcrConfig",
        text_config=text("qwen3"),
        vision_config=tower("pixtral", patch_size=7, head_dim=16, image_size=112),
        image_token_id=IMAGE,
    )


def idefics2() -> Any:
    return config(
        "Idefics2Config",
        text_config=text("mistral", sliding_window=None),
        vision_config=tower("idefics2_vision", patch_size=7),
        perceiver_config={
            "hidden_size": HIDDEN,
            "resampler_n_latents": 16,
            "resampler_depth": 1,
            "resampler_n_heads": 2,
            "resampler_head_dim": 16,
            "num_key_value_heads": 1,
        },
        image_token_id=IMAGE,
    )


def vipllava() -> Any:
    return config(
        "VipLlavaConfig",
        text_config=text("llama"),
        vision_config=tower("clip_vision_model"),
        image_token_index=IMAGE,
        image_seq_length=16,
        vision_feature_layers=[-1, -2],
    )


def video_llava() -> Any:
    return config(
        "VideoLlavaConfig",
        text_config=text("llama"),
        vision_config=tower("clip_vision_model"),
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        image_seq_length=16,
    )


def deepseek_vl() -> Any:
    return config(
        "DeepseekVLConfig",
        text_config=text("llama"),
        vision_config=tower("siglip_vision_model", **SIGLIP),
        image_token_id=IMAGE,
    )


def janus() -> Any:
    return config(
        "JanusConfig",
        text_config=text("llama"),
        vision_config=tower(
            "janus_vision_model", projection_dim=HIDDEN, num_image_tokens=16, mlp_ratio=2
        ),
        vq_config={
            "base_channels": 32,
            "channel_multiplier": [1],
            "latent_channels": 32,
            "num_res_blocks": 1,
            "num_embeddings": 8,
            "image_token_embed_dim": HIDDEN,
            "projection_dim": HIDDEN,
            "num_hidden_layers": 1,
        },
        image_token_id=IMAGE,
    )


def aria() -> Any:
    return config(
        "AriaConfig",
        text_config=text("aria_text", moe_num_experts=4, moe_topk=2, moe_num_shared_experts=1),
        vision_config=tower("idefics3_vision"),
        projector_patch_to_query_dict={16: 12},
        image_token_index=IMAGE,
    )


def got_ocr2() -> Any:
    return config(
        "GotOcr2Config",
        text_config=text("qwen2"),
        vision_config=tower(
            "got_ocr2_vision",
            image_size=64,
            patch_size=4,
            output_channels=16,
            mlp_dim=48,
            window_size=4,
            global_attn_indexes=[2],
        ),
        image_token_index=IMAGE,
        image_seq_length=16,
    )


def molmo2() -> Any:
    return transformers.Molmo2Config(
        text_config=text("molmo2_text", additional_vocab_size=8),
        vision_config=tower(
            "molmo2_vision", num_key_value_heads=2, head_dim=16, image_size=[56, 56]
        ),
        adapter_config={
            "vision_feature_layer": [2, 1],
            "hidden_size": 32,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "intermediate_size": 48,
            "text_hidden_size": HIDDEN,
        },
        image_patch_id=IMAGE,
        image_start_token_id=START,
        image_end_token_id=END,
        low_res_image_start_token_id=2,
        frame_start_token_id=2,
        frame_end_token_id=3,
        tie_word_embeddings=False,
    )


# Layers 1 and 4 attend.
LINEAR = {
    "layer_types": ["linear_attention", "full_attention", "linear_attention"] * 2,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
UNSTACKED = QWEN_TOWER | {"num_position_embeddings": 64}


def lfm2_vl() -> Any:
    return config(
        "Lfm2VlConfig",
        text_config=text(
            "lfm2",
            layer_types=["conv", "full_attention", "conv"] * 2,
            block_auto_adjust_ff_dim=False,
        ),
        vision_config=tower(
            "siglip2_vision_model", patch_size=GRID_PATCH, num_patches=64, **SIGLIP
        ),
        image_token_id=IMAGE,
        projector_hidden_size=48,
    )


def gemma4(**changes: Any) -> Any:
    """As E2B and E4B: the last three layers read the keys of layers 1 and 2, and each has inputs of its own."""
    small = {
        "num_kv_shared_layers": 3,
        "use_double_wide_mlp": True,
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": VOCABULARY,
    }
    return config(
        "Gemma4Config",
        text_config=text(
            "gemma4_text",
            global_head_dim=32,
            sliding_window=12,
            layer_types=["sliding_attention", "full_attention"] * 3,
            **small | changes,
        ),
        vision_config={
            "model_type": "gemma4_vision",
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "patch_size": GRID_PATCH,
            "pooling_kernel_size": 2,
            "position_embedding_size": 32,
        },
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        boi_token_id=START,
        eoi_token_id=END,
    )


def gemma4_moe() -> Any:
    """As 26B-A4B: pictures see themselves in both directions, and values are keys in some layers."""
    return gemma4(
        num_kv_shared_layers=0,
        use_double_wide_mlp=False,
        hidden_size_per_layer_input=0,
        attention_k_eq_v=True,
        num_global_key_value_heads=1,
        use_bidirectional_attention="vision",
        enable_moe_block=True,
        num_experts=4,
        top_k_experts=2,
        moe_intermediate_size=32,
    )


def llama4() -> Any:
    """Chunks and temperatures change within a prompt."""
    return config(
        "Llama4Config",
        text_config=text(
            "llama4_text",
            intermediate_size_mlp=64,
            num_local_experts=2,
            interleave_moe_layer_step=2,
            no_rope_layers=[1, 1, 0, 1, 1, 0],
            attention_chunk_size=16,
            floor_scale=4,
            attn_scale=1.0,
        ),
        vision_config=tower(
            "llama4_vision_model",
            image_size=112,
            num_hidden_layers=2,
            vision_output_dim=32,
            projector_input_dim=32,
            projector_output_dim=32,
            intermediate_size=128,
        ),
        image_token_index=IMAGE,
        boi_token_index=START,
        eoi_token_index=END,
    )
