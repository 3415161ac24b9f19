"""The families of the zoo: a tiny configuration each, and which pictures it takes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers

from autoprune.models.cogvlm import CogVLMConfig, CogVLMForConditionalGeneration
from autoprune.models.senna import SennaConfig, SennaForConditionalGeneration
from tests.zoo_configs import HEADS
from tests.zoo_configs import config as _config
from tests.zoo_configs import qwen as _qwen
from tests.zoo_configs import text as _text
from tests.zoo_configs import tower as _tower
from tests.zoo_pictures import (
    CROP,
    END,
    GRID_PATCH,
    HEAD_DIM,
    HIDDEN,
    IMAGE,
    PATCH,
    PINPOINTS,
    START,
    VIDEO,
    Payload,
    Visual,
    anyres_image,
    anyres_video,
    bare,
    grid_image,
    grid_video,
    images_per_prompt,
    rows_image,
    square,
    timed_video,
)


@dataclass(frozen=True)
class Family:
    """How to build one family.

    config: the tiny configuration.
    model: name of the transformers class, or a class of the library's own.
    image, video: (which, generator) -> Visual; `which` varies the shape where the family can.
    token_types: name of the token type argument, if there is one.
    type_of: token id -> its type.
    collate: joins the visuals of a batch, given prompt by prompt.
    image_first: the picture stands at the very start of the prompt.
    """

    config: Callable[[], transformers.PretrainedConfig]
    model: str | type
    image: Callable[[int, torch.Generator], Visual]
    video: Callable[[int, torch.Generator], Visual] | None = None
    token_types: str | None = None
    type_of: dict[int, int] = field(default_factory=lambda: {IMAGE: 1, VIDEO: 2})
    collate: Callable[[list[list[Payload]]], Payload] | None = None
    attentions: tuple[str, ...] = ("sdpa", "eager")
    several_images: bool = True
    image_first: bool = False

    @property
    def media(self) -> tuple[str, ...]:
        return ("image",) if self.video is None else ("image", "video")


def llava(text: str = "llama", **changes: Any) -> transformers.PretrainedConfig:
    return _config(
        "LlavaConfig",
        text_config=_text(text, **changes),
        vision_config=_tower("clip_vision_model"),
        image_token_index=IMAGE,
        image_seq_length=16,
    )


def _anyres(cls: str, text: str, tower: str, **changes: Any) -> transformers.PretrainedConfig:
    return _config(
        cls,
        text_config=_text(text),
        vision_config=_tower(tower, image_size=CROP, patch_size=PATCH),
        image_token_index=IMAGE,
        image_grid_pinpoints=PINPOINTS,
        **changes,
    )


def _qwen2_vl() -> transformers.PretrainedConfig:
    vision = {"embed_dim": 32, "hidden_size": HIDDEN, "mlp_ratio": 2}
    return _qwen("Qwen2VLConfig", "qwen2_vl_text", [2, 3, 3], vision)


def _qwen2_5_vl() -> transformers.PretrainedConfig:
    vision = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "out_hidden_size": HIDDEN,
        "window_size": 4 * GRID_PATCH,
        "fullatt_block_indexes": [1, 3],
    }
    return _qwen("Qwen2_5_VLConfig", "qwen2_5_vl_text", [2, 3, 3], vision)


def _qwen3_vl() -> transformers.PretrainedConfig:
    vision = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "out_hidden_size": HIDDEN,
        "num_position_embeddings": 64,
        "deepstack_visual_indexes": [0, 1, 2],
    }
    return _qwen("Qwen3VLConfig", "qwen3_vl_text", [2, 3, 3], vision)


def _glm4v() -> transformers.PretrainedConfig:
    vision = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "out_hidden_size": HIDDEN,
        "image_size": 32,
    }
    return _qwen("Glm4vConfig", "glm4v_text", [1, 1, 2], vision)


def internvl(text: str = "qwen2", **changes: Any) -> transformers.PretrainedConfig:
    return _config(
        "InternVLConfig",
        text_config=_text(text, **changes),
        vision_config=_tower("internvl_vision", patch_size=7),
        image_token_id=IMAGE,
        image_seq_length=16,
    )


def _idefics(cls: str, tower: str) -> transformers.PretrainedConfig:
    return _config(
        cls,
        text_config=_text("llama"),
        vision_config=_tower(tower, patch_size=7),
        image_token_id=IMAGE,
        scale_factor=2,
    )


def _gemma3() -> transformers.PretrainedConfig:
    text = _text(
        "gemma3_text",
        sliding_window=12,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"] * 2,
        query_pre_attn_scalar=HEAD_DIM,
    )
    return _config(
        "Gemma3Config",
        text_config=text,
        vision_config=_tower("siglip_vision_model", patch_size=7, vision_use_head=False),
        image_token_index=IMAGE,
        mm_tokens_per_image=16,
        boi_token_index=START,
        eoi_token_index=END,
    )


def _paligemma(text: str, **changes: Any) -> transformers.PretrainedConfig:
    return _config(
        "PaliGemmaConfig",
        text_config=_text(text, **changes),
        vision_config=_tower("siglip_vision_model", projection_dim=HIDDEN, vision_use_head=False),
        image_token_index=IMAGE,
        projection_dim=HIDDEN,
        hidden_size=HIDDEN,
    )


def mistral3(text: str = "mistral", **changes: Any) -> transformers.PretrainedConfig:
    return _config(
        "Mistral3Config",
        text_config=_text(text, sliding_window=None, **changes),
        vision_config=_tower("pixtral", patch_size=7, head_dim=16, image_size=112),
        image_token_index=IMAGE,
    )


def _aya_vision() -> transformers.PretrainedConfig:
    text = _text(
        "cohere2",
        sliding_window=12,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"] * 2,
    )
    return _config(
        "AyaVisionConfig",
        text_config=text,
        vision_config=_tower("siglip_vision_model", patch_size=7, vision_use_head=False),
        image_token_index=IMAGE,
    )


def _cogvlm() -> transformers.PretrainedConfig:
    return CogVLMConfig(
        text_config=_text("llama", num_key_value_heads=HEADS),
        vision_config=_tower("cogvlm_vision"),
        image_token_id=IMAGE,
        boi_token_id=START,
        eoi_token_id=END,
    )


def senna(**changes: Any) -> transformers.PretrainedConfig:
    """Views of 16 patches, of which an adapter makes 8 tokens."""
    return SennaConfig(
        text_config=_text("llama"),
        vision_config=_tower("clip_vision_model"),
        image_token_index=IMAGE,
        image_seq_length=8,
        **changes,
    )


FAMILIES: dict[str, Family] = {
    "llava": Family(llava, "LlavaForConditionalGeneration", bare(16)),
    "llava_sliding": Family(
        lambda: llava("mistral", sliding_window=20), "LlavaForConditionalGeneration", bare(16)
    ),
    "llava_next": Family(
        lambda: _anyres("LlavaNextConfig", "llama", "clip_vision_model"),
        "LlavaNextForConditionalGeneration",
        anyres_image,
    ),
    "qwen2_5_vl": Family(
        _qwen2_5_vl,
        "Qwen2_5_VLForConditionalGeneration",
        grid_image,
        grid_video,
        token_types="mm_token_type_ids",
    ),
    "internvl": Family(internvl, "InternVLForConditionalGeneration", square(16)),
    "llava_onevision": Family(
        lambda: _anyres(
            "LlavaOnevisionConfig", "qwen2", "siglip_vision_model", video_token_index=VIDEO
        ),
        "LlavaOnevisionForConditionalGeneration",
        anyres_image,
        anyres_video(4 * 4 + 1),
    ),
    "llava_next_video": Family(
        lambda: _anyres(
            "LlavaNextVideoConfig", "llama", "clip_vision_model", video_token_index=VIDEO
        ),
        "LlavaNextVideoForConditionalGeneration",
        anyres_image,
        anyres_video(4 * 4),
    ),
    "qwen2_vl": Family(
        _qwen2_vl,
        "Qwen2VLForConditionalGeneration",
        grid_image,
        grid_video,
        token_types="mm_token_type_ids",
    ),
    "qwen3_vl": Family(
        _qwen3_vl,
        "Qwen3VLForConditionalGeneration",
        grid_image,
        timed_video(VIDEO),
        token_types="mm_token_type_ids",
    ),
    "glm4v": Family(
        _glm4v,
        "Glm4vForConditionalGeneration",
        grid_image,
        timed_video(IMAGE),
        token_types="mm_token_type_ids",
    ),
    "idefics3": Family(
        lambda: _idefics("Idefics3Config", "idefics3_vision"),
        "Idefics3ForConditionalGeneration",
        square(16),
        collate=images_per_prompt,
    ),
    "smolvlm": Family(
        lambda: _idefics("SmolVLMConfig", "smolvlm_vision"),
        "SmolVLMForConditionalGeneration",
        square(16),
        collate=images_per_prompt,
    ),
    "gemma3": Family(
        _gemma3, "Gemma3ForConditionalGeneration", square(16), token_types="token_type_ids"
    ),
    "paligemma": Family(
        lambda: _paligemma("gemma"),
        "PaliGemmaForConditionalGeneration",
        bare(16),
        token_types="token_type_ids",
        type_of={},
        several_images=False,
        image_first=True,
    ),
    "paligemma2": Family(
        lambda: _paligemma("gemma2", sliding_window=16, query_pre_attn_scalar=HEAD_DIM),
        "PaliGemmaForConditionalGeneration",
        bare(16),
        token_types="token_type_ids",
        type_of={},
        attentions=("eager",),
        several_images=False,
        image_first=True,
    ),
    "aya_vision": Family(_aya_vision, "AyaVisionForConditionalGeneration", square(16)),
    "mistral3": Family(mistral3, "Mistral3ForConditionalGeneration", rows_image),
    "cogvlm": Family(_cogvlm, CogVLMForConditionalGeneration, square(16), several_images=False),
    "senna": Family(senna, SennaForConditionalGeneration, bare(8)),
}
