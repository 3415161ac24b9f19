"""Families on which only the core of the checks is run, for the sake of time: see `Family.core`.

Those that the installed transformers lacks are left out.
"""

from __future__ import annotations

from inspect import signature
from typing import Any

import transformers
from packaging.version import Version
from transformers.modeling_outputs import MoeCausalLMOutputWithPast

from tests import zoo_core_configs as configs
from tests.zoo_configs import EXPERTS, LATENT, qwen
from tests.zoo_families import Family, mistral3
from tests.zoo_pictures import (
    GRID_PATCH,
    IMAGE,
    VIDEO,
    bare,
    flat_image,
    grid_image,
    grid_video,
    images_per_prompt,
    join_pooled,
    paced_video,
    padded_patches,
    patch_image,
    placed_image,
    placed_video,
    pooled_image,
    rows_image,
    square,
    timed_video,
    unmerged_image,
)

# Llama 4 of transformers 5.24 asks the output of its language model for this, which has nothing of the kind.
if not hasattr(MoeCausalLMOutputWithPast, "image_outputs"):
    MoeCausalLMOutputWithPast.image_outputs = None

# Video-LLaVA had a name of its own for pictures before.
VIDEO_LLAVA_PIXELS = (
    "pixel_values"
    if Version(transformers.__version__) >= Version("5.23")
    else "pixel_values_images"
)


def _made(cls: str, make: Any, image: Any, video: Any = None, **more: Any) -> Family:
    return Family(make, f"{cls}ForConditionalGeneration", image, video, **more)


def _with_types(cls: str, make: Any, video: Any = grid_video) -> Family:
    return _made(cls, make, grid_image, video, token_types="mm_token_type_ids")


def _gemma4(make: Any) -> Family:
    joined = (
        "num_frames_per_video" in signature(transformers.Gemma4Model.get_video_features).parameters
    )
    return _made(
        "Gemma4", make, placed_image, placed_video(joined), token_types="mm_token_type_ids"
    )


CORE: dict[str, Family] = {
    "qwen3_vl_moe": _with_types(
        "Qwen3VLMoe",
        lambda: qwen(
            "Qwen3VLMoeConfig",
            "qwen3_vl_moe_text",
            [2, 3, 3],
            configs.DEEPSTACK,
            text_changes=configs.MOE,
        ),
        timed_video(VIDEO),
    ),
    "glm4v_moe": _with_types(
        "Glm4vMoe",
        lambda: qwen(
            "Glm4vMoeConfig", "glm4v_moe_text", [1, 1, 2], configs.GLM_TOWER, text_changes=EXPERTS
        ),
        timed_video(IMAGE),
    ),
    "glm46v": _with_types(
        "Glm46V",
        lambda: qwen(
            "Glm46VConfig",
            "glm4v_text",
            [1, 1, 2],
            configs.GLM_TOWER | {"model_type": "glm4v_vision"},
        ),
        timed_video(IMAGE),
    ),
    "glm_ocr": _with_types(
        "GlmOcr",
        lambda: qwen("GlmOcrConfig", "glm_ocr_text", [1, 1, 2], configs.GLM_TOWER),
        timed_video(IMAGE),
    ),
    "qwen2_5_omni_thinker": Family(
        lambda: configs.omni(
            "Qwen2_5OmniThinkerConfig",
            "qwen2_5_omni_text",
            configs.QWEN_TOWER | {"window_size": 4 * GRID_PATCH, "fullatt_block_indexes": [1, 3]},
        ),
        "Qwen2_5OmniThinkerForConditionalGeneration",
        grid_image,
        paced_video,
    ),
    "qwen3_omni_moe_thinker": Family(
        lambda: configs.omni(
            "Qwen3OmniMoeThinkerConfig", "qwen3_omni_moe_text", configs.DEEPSTACK, **configs.MOE
        ),
        "Qwen3OmniMoeThinkerForConditionalGeneration",
        grid_image,
        paced_video,
    ),
    "paddleocr_vl": _made(
        "PaddleOCRVL", configs.paddleocr, patch_image, token_types="mm_token_type_ids"
    ),
    "video_llama_3": _made("VideoLlama3", configs.video_llama, unmerged_image),
    "cosmos3_edge": _made(
        "Cosmos3Edge", configs.cosmos, flat_image, token_types="mm_token_type_ids"
    ),
    "kimi_k25": _made("Kimi_K25", configs.kimi, patch_image),
    "cohere2_vision": _made("Cohere2Vision", configs.cohere2_vision, square(16)),
    "ovis2": _made("Ovis2", configs.ovis2, square(16)),
    "lighton_ocr": _made("LightOnOcr", configs.lighton_ocr, rows_image),
    "mistral4": _made("Mistral3", lambda: mistral3("mistral4", **LATENT | EXPERTS), rows_image),
    "idefics2": _made("Idefics2", configs.idefics2, square(16), collate=images_per_prompt),
    "vipllava": _made("VipLlava", configs.vipllava, bare(16)),
    "video_llava": _made("VideoLlava", configs.video_llava, bare(16, VIDEO_LLAVA_PIXELS)),
    "deepseek_vl": _made("DeepseekVL", configs.deepseek_vl, bare(16)),
    "janus": _made("Janus", configs.janus, bare(16)),
    "aria": _made("Aria", configs.aria, bare(12)),
    "got_ocr2": _made("GotOcr2", configs.got_ocr2, square(16, 64), attentions=("eager",)),
    "qwen3_5": _with_types(
        "Qwen3_5",
        lambda: qwen(
            "Qwen3_5Config",
            "qwen3_5_text",
            [2, 3, 3],
            configs.UNSTACKED,
            text_changes=configs.LINEAR,
        ),
        timed_video(VIDEO),
    ),
    "qwen3_5_moe": _with_types(
        "Qwen3_5Moe",
        lambda: qwen(
            "Qwen3_5MoeConfig",
            "qwen3_5_moe_text",
            [2, 3, 3],
            configs.UNSTACKED,
            text_changes=configs.LINEAR | configs.MOE,
        ),
        timed_video(VIDEO),
    ),
    "lfm2_vl": _made("Lfm2Vl", configs.lfm2_vl, padded_patches),
    "molmo2": _made(
        "Molmo2",
        configs.molmo2,
        pooled_image,
        token_types="mm_token_type_ids",
        collate=join_pooled,
    ),
    "gemma4": _gemma4(configs.gemma4),
    "gemma4_moe": _gemma4(configs.gemma4_moe),
    "llama4": _made("Llama4", configs.llama4, square(16, 112)),
}
CORE = {name: family for name, family in CORE.items() if hasattr(transformers, family.model)}
