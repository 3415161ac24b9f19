"""Families on which only the core of the checks is run, for the sake of time: see `Family.core`.

Those that the installed transformers lacks are left out.
"""

from __future__ import annotations

from typing import Any

import transformers
from packaging.version import Version

from tests.zoo_configs import EXPERTS, LATENT, config, qwen, text, tower
from tests.zoo_families import Family, mistral3
from tests.zoo_pictures import (
    END,
    GRID_PATCH,
    HIDDEN,
    IMAGE,
    START,
    VIDEO,
    VOCABULARY,
    bare,
    flat_image,
    grid_image,
    grid_video,
    images_per_prompt,
    join_pooled,
    paced_video,
    padded_patches,
    patch_image,
    pooled_image,
    rows_image,
    square,
    timed_video,
    unmerged_image,
)

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
# Until then it had a name of its own for pictures.
VIDEO_LLAVA_PIXELS = (
    "pixel_values"
    if Version(transformers.__version__) >= Version("5.23")
    else "pixel_values_images"
)
SIGLIP = {"vision_use_head": False}


def _omni(cls: str, name: str, vision: dict[str, Any], **changes: Any) -> Any:
    return qwen(
        cls, name, [2, 3, 3], vision, audio_config=AUDIO, text_changes=changes, audio_token_id=2
    )


def _grid(cls: str, name: str, vision: dict[str, Any], **changes: Any) -> Any:
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


def _paddleocr() -> Any:
    return _grid(
        "PaddleOCRVLConfig", "paddleocr_vl_text", {"image_size": 32}, rope_parameters=MROPE
    )


def _video_llama() -> Any:
    return _grid("VideoLlama3Config", "qwen2", {"model_type": "video_llama_3_vision"})


def _cosmos() -> Any:
    made = _grid(
        "Cosmos3EdgeConfig", "cosmos3_edge_text", {"num_patches": 16}, rope_parameters=MROPE
    )
    made.projector_hidden_size = 64
    made.vision_start_token_id, made.vision_end_token_id = START, END
    return made


def _kimi() -> Any:
    made = _grid(
        "Kimi_K25Config",
        "deepseek_v3",
        {"pos_emb_height": 8, "pos_emb_width": 8},
        **LATENT | EXPERTS,
    )
    made.projection_hidden_size = 32
    return made


def _cohere2_vision() -> Any:
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


def _ovis2() -> Any:
    return config(
        "Ovis2Config",
        text_config=text("qwen2"),
        vision_config=tower("ovis2_vision", vocab_size=40, hidden_stride=2, patch_size=7),
        image_token_id=IMAGE,
        visual_indicator_token_ids=[START, END, VIDEO, 2, 3],
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
    )


def _lighton_ocr() -> Any:
    return config(
        "LightOnOcrConfig",
        text_config=text("qwen3"),
        vision_config=tower("pixtral", patch_size=7, head_dim=16, image_size=112),
        image_token_id=IMAGE,
    )


def _idefics2() -> Any:
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


def _vipllava() -> Any:
    return config(
        "VipLlavaConfig",
        text_config=text("llama"),
        vision_config=tower("clip_vision_model"),
        image_token_index=IMAGE,
        image_seq_length=16,
        vision_feature_layers=[-1, -2],
    )


def _video_llava() -> Any:
    return config(
        "VideoLlavaConfig",
        text_config=text("llama"),
        vision_config=tower("clip_vision_model"),
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        image_seq_length=16,
    )


def _deepseek_vl() -> Any:
    return config(
        "DeepseekVLConfig",
        text_config=text("llama"),
        vision_config=tower("siglip_vision_model", **SIGLIP),
        image_token_id=IMAGE,
    )


def _janus() -> Any:
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


def _aria() -> Any:
    return config(
        "AriaConfig",
        text_config=text("aria_text", moe_num_experts=4, moe_topk=2, moe_num_shared_experts=1),
        vision_config=tower("idefics3_vision"),
        projector_patch_to_query_dict={16: 12},
        image_token_index=IMAGE,
    )


def _got_ocr2() -> Any:
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


def _molmo2() -> Any:
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


def _lfm2_vl() -> Any:
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


def _made(cls: str, make: Any, image: Any, video: Any = None, **more: Any) -> Family:
    return Family(make, f"{cls}ForConditionalGeneration", image, video, **more)


def _with_types(cls: str, make: Any, video: Any = grid_video) -> Family:
    return _made(cls, make, grid_image, video, token_types="mm_token_type_ids")


CORE: dict[str, Family] = {
    "qwen3_vl_moe": _with_types(
        "Qwen3VLMoe",
        lambda: qwen(
            "Qwen3VLMoeConfig", "qwen3_vl_moe_text", [2, 3, 3], DEEPSTACK, text_changes=MOE
        ),
        timed_video(VIDEO),
    ),
    "glm4v_moe": _with_types(
        "Glm4vMoe",
        lambda: qwen(
            "Glm4vMoeConfig", "glm4v_moe_text", [1, 1, 2], GLM_TOWER, text_changes=EXPERTS
        ),
        timed_video(IMAGE),
    ),
    "glm46v": _with_types(
        "Glm46V",
        lambda: qwen(
            "Glm46VConfig",
            "glm4v_text",
            [1, 1, 2],
            GLM_TOWER | {"model_type": "glm4v_vision"},
        ),
        timed_video(IMAGE),
    ),
    "glm_ocr": _with_types(
        "GlmOcr",
        lambda: qwen("GlmOcrConfig", "glm_ocr_text", [1, 1, 2], GLM_TOWER),
        timed_video(IMAGE),
    ),
    "qwen2_5_omni_thinker": Family(
        lambda: _omni(
            "Qwen2_5OmniThinkerConfig",
            "qwen2_5_omni_text",
            QWEN_TOWER | {"window_size": 4 * GRID_PATCH, "fullatt_block_indexes": [1, 3]},
        ),
        "Qwen2_5OmniThinkerForConditionalGeneration",
        grid_image,
        paced_video,
    ),
    "qwen3_omni_moe_thinker": Family(
        lambda: _omni("Qwen3OmniMoeThinkerConfig", "qwen3_omni_moe_text", DEEPSTACK, **MOE),
        "Qwen3OmniMoeThinkerForConditionalGeneration",
        grid_image,
        paced_video,
    ),
    "paddleocr_vl": _made("PaddleOCRVL", _paddleocr, patch_image, token_types="mm_token_type_ids"),
    "video_llama_3": _made("VideoLlama3", _video_llama, unmerged_image),
    "cosmos3_edge": _made("Cosmos3Edge", _cosmos, flat_image, token_types="mm_token_type_ids"),
    "kimi_k25": _made("Kimi_K25", _kimi, patch_image),
    "cohere2_vision": _made("Cohere2Vision", _cohere2_vision, square(16)),
    "ovis2": _made("Ovis2", _ovis2, square(16)),
    "lighton_ocr": _made("LightOnOcr", _lighton_ocr, rows_image),
    "mistral4": _made("Mistral3", lambda: mistral3("mistral4", **LATENT | EXPERTS), rows_image),
    "idefics2": _made("Idefics2", _idefics2, square(16), collate=images_per_prompt),
    "vipllava": _made("VipLlava", _vipllava, bare(16)),
    "video_llava": _made("VideoLlava", _video_llava, bare(16, VIDEO_LLAVA_PIXELS)),
    "deepseek_vl": _made("DeepseekVL", _deepseek_vl, bare(16)),
    "janus": _made("Janus", _janus, bare(16)),
    "aria": _made("Aria", _aria, bare(12)),
    "got_ocr2": _made("GotOcr2", _got_ocr2, square(16, 64), attentions=("eager",)),
    "qwen3_5": _with_types(
        "Qwen3_5",
        lambda: qwen("Qwen3_5Config", "qwen3_5_text", [2, 3, 3], UNSTACKED, text_changes=LINEAR),
        timed_video(VIDEO),
    ),
    "qwen3_5_moe": _with_types(
        "Qwen3_5Moe",
        lambda: qwen(
            "Qwen3_5MoeConfig", "qwen3_5_moe_text", [2, 3, 3], UNSTACKED, text_changes=LINEAR | MOE
        ),
        timed_video(VIDEO),
    ),
    "lfm2_vl": _made("Lfm2Vl", _lfm2_vl, padded_patches),
    "molmo2": _made(
        "Molmo2",
        _molmo2,
        pooled_image,
        token_types="mm_token_type_ids",
        collate=join_pooled,
    ),
}
CORE = {name: family for name, family in CORE.items() if hasattr(transformers, family.model)}
