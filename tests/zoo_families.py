"""The families of the zoo: tiny configurations, and pictures and videos in each family's layout."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers

PAD, BOS, FIRST_WORD, WORDS = 0, 1, 4, 120
IMAGE, VIDEO, START, END = 130, 131, 132, 133
SPECIAL = (PAD, BOS, 2, 3, IMAGE, VIDEO, START, END)
VOCABULARY = 140
LAYERS, HIDDEN, HEADS, HEAD_DIM = 6, 64, 4, 16

Payload = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Visual:
    """One picture or video: its token ids inside the prompt, and what its pixels are called."""

    ids: list[int]
    payload: Payload


@dataclass(frozen=True)
class Family:
    """How to build one family.

    config: the tiny configuration.
    model: name of the transformers class.
    image, video: (which, generator) -> Visual; `which` varies the shape where the family can.
    token_types: name of the token type argument, if there is one.
    type_of: token id -> its type.
    collate: joins the visuals of a batch, given prompt by prompt.
    image_first: the picture stands at the very start of the prompt.
    """

    config: Callable[[], transformers.PretrainedConfig]
    model: str
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


def words(count: int, generator: torch.Generator) -> list[int]:
    return torch.randint(FIRST_WORD, WORDS, (count,), generator=generator).tolist()


def _images_per_prompt(payloads: list[list[Payload]]) -> Payload:
    """Idefics layout: pixel_values [batch, images, 3, height, width], missing images all zero."""
    shape = next(p["pixel_values"] for prompt in payloads for p in prompt).shape[1:]
    most = max(map(len, payloads))
    pixels = torch.zeros(len(payloads), most, *shape)
    for row, prompt in enumerate(payloads):
        for column, payload in enumerate(prompt):
            pixels[row, column] = payload["pixel_values"][0]
    return {"pixel_values": pixels}


def _pixels(*shape: int) -> Callable[[torch.Generator], torch.Tensor]:
    return lambda generator: torch.randn(shape, generator=generator)


def _text(kind: str, **changes: Any) -> dict[str, Any]:
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


def _tower(kind: str, **changes: Any) -> dict[str, Any]:
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


def _square(tokens: int, size: int = 56) -> Callable[[int, torch.Generator], Visual]:
    """A family whose pictures all have the same size and number of tokens."""

    def image(which: int, generator: torch.Generator) -> Visual:
        pixels = _pixels(1, 3, size, size)(generator)
        return Visual([START, *[IMAGE] * tokens, END], {"pixel_values": pixels})

    return image


def _bare(tokens: int) -> Callable[[int, torch.Generator], Visual]:
    """A picture without start and end tokens around it."""

    def image(which: int, generator: torch.Generator) -> Visual:
        return Visual([IMAGE] * tokens, {"pixel_values": _pixels(1, 3, 56, 56)(generator)})

    return image


def _config(cls: str, **fields: Any) -> transformers.PretrainedConfig:
    return getattr(transformers, cls)(tie_word_embeddings=False, **fields)


def _llava(text: str = "llama", **changes: Any) -> transformers.PretrainedConfig:
    return _config(
        "LlavaConfig",
        text_config=_text(text, **changes),
        vision_config=_tower("clip_vision_model"),
        image_token_index=IMAGE,
        image_seq_length=16,
    )


# Crops of 4 x 4 patches: one tile, or two side by side, or two stacked.
_CROP, _PATCH = 56, 14
_PINPOINTS = [[_CROP, _CROP], [_CROP, 2 * _CROP], [2 * _CROP, _CROP]]
# Picture sizes (height, width), their tiles, and the token grid left after the model's unpadding.
_ANYRES = [((56, 56), 1, (4, 4)), ((56, 112), 2, (4, 8)), ((28, 112), 2, (2, 8))]


def _anyres_image(which: int, generator: torch.Generator) -> Visual:
    (height, width), tiles, (rows, columns) = _ANYRES[which]
    tokens = 16 + rows * (columns + 1)  # base crop, then the grid with a newline after every row
    payload = {
        "pixel_values": _pixels(1, tiles + 1, 3, _CROP, _CROP)(generator),
        "image_sizes": torch.tensor([[height, width]]),
    }
    return Visual([IMAGE] * tokens, payload)


def _anyres(cls: str, text: str, tower: str, **changes: Any) -> transformers.PretrainedConfig:
    return _config(
        cls,
        text_config=_text(text),
        vision_config=_tower(tower, image_size=_CROP, patch_size=_PATCH),
        image_token_index=IMAGE,
        image_grid_pinpoints=_PINPOINTS,
        **changes,
    )


def _anyres_video(tokens: int) -> Callable[[int, torch.Generator], Visual]:
    def video(which: int, generator: torch.Generator) -> Visual:
        pixels = _pixels(1, 4, 3, _CROP, _CROP)(generator)
        return Visual([VIDEO] * tokens, {"pixel_values_videos": pixels})

    return video


# Grids (frames, height, width) in patches; four patches make one token.
_GRIDS = [(1, 8, 8), (1, 8, 12), (1, 4, 12)]
_VIDEO_GRIDS = [(2, 4, 8), (2, 4, 6), (3, 4, 6)]
_QWEN_PATCH = 4


def _patches(grid: tuple[int, int, int], prefix: str, generator: torch.Generator) -> Payload:
    rows = grid[0] * grid[1] * grid[2]
    pixels = "pixel_values" if prefix == "image" else "pixel_values_videos"
    return {
        pixels: _pixels(rows, 3 * 2 * _QWEN_PATCH**2)(generator),
        f"{prefix}_grid_thw": torch.tensor([grid]),
    }


def _qwen_image(which: int, generator: torch.Generator) -> Visual:
    t, h, w = _GRIDS[which]
    return Visual(
        [START, *[IMAGE] * (t * h * w // 4), END], _patches((t, h, w), "image", generator)
    )


def _qwen_video(which: int, generator: torch.Generator) -> Visual:
    t, h, w = _VIDEO_GRIDS[which]
    return Visual(
        [START, *[VIDEO] * (t * h * w // 4), END], _patches((t, h, w), "video", generator)
    )


def _timed_video(token: int) -> Callable[[int, torch.Generator], Visual]:
    """Every frame stands alone, behind the words of its time stamp."""

    def video(which: int, generator: torch.Generator) -> Visual:
        t, h, w = _VIDEO_GRIDS[which]
        ids: list[int] = []
        for _ in range(t):
            ids += [*words(2, generator), START, *[token] * (h * w // 4), END]
        return Visual(ids, _patches((t, h, w), "video", generator))

    return video


def _qwen(cls: str, text: str, sections: list[int], vision: dict[str, Any]) -> Any:
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": sections}
    if cls == "Glm4vConfig":
        tokens = {"image_start_token_id": START, "image_end_token_id": END}
        rope["partial_rotary_factor"] = 0.5
    else:
        tokens = {"vision_start_token_id": START, "vision_end_token_id": END}
    tower = {
        "depth": 4,
        "num_heads": 2,
        "patch_size": _QWEN_PATCH,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "in_channels": 3,
    }
    return _config(
        cls,
        text_config=_text(text, rope_parameters=rope),
        vision_config=tower | vision,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        **tokens,
    )


def _qwen2_vl() -> transformers.PretrainedConfig:
    vision = {"embed_dim": 32, "hidden_size": HIDDEN, "mlp_ratio": 2}
    return _qwen("Qwen2VLConfig", "qwen2_vl_text", [2, 3, 3], vision)


def _qwen2_5_vl() -> transformers.PretrainedConfig:
    vision = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "out_hidden_size": HIDDEN,
        "window_size": 4 * _QWEN_PATCH,
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


def _internvl() -> transformers.PretrainedConfig:
    return _config(
        "InternVLConfig",
        text_config=_text("qwen2"),
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


def _mistral3_image(which: int, generator: torch.Generator) -> Visual:
    height, width = [(56, 56), (56, 84), (28, 84)][which]
    payload = {
        "pixel_values": _pixels(1, 3, height, width)(generator),
        "image_sizes": torch.tensor([[height, width]]),
    }
    row = [*[IMAGE] * (width // 14), START]
    return Visual(row * (height // 14), payload)


def _mistral3() -> transformers.PretrainedConfig:
    return _config(
        "Mistral3Config",
        text_config=_text("mistral", sliding_window=None),
        vision_config=_tower("pixtral", patch_size=7, head_dim=16, image_size=112),
        image_token_index=IMAGE,
    )


FAMILIES: dict[str, Family] = {
    "llava": Family(_llava, "LlavaForConditionalGeneration", _bare(16)),
    "llava_sliding": Family(
        lambda: _llava("mistral", sliding_window=20), "LlavaForConditionalGeneration", _bare(16)
    ),
    "llava_next": Family(
        lambda: _anyres("LlavaNextConfig", "llama", "clip_vision_model"),
        "LlavaNextForConditionalGeneration",
        _anyres_image,
    ),
    "qwen2_5_vl": Family(
        _qwen2_5_vl,
        "Qwen2_5_VLForConditionalGeneration",
        _qwen_image,
        _qwen_video,
        token_types="mm_token_type_ids",
    ),
    "internvl": Family(_internvl, "InternVLForConditionalGeneration", _square(16)),
    "llava_onevision": Family(
        lambda: _anyres(
            "LlavaOnevisionConfig", "qwen2", "siglip_vision_model", video_token_index=VIDEO
        ),
        "LlavaOnevisionForConditionalGeneration",
        _anyres_image,
        _anyres_video(4 * 4 + 1),
    ),
    "llava_next_video": Family(
        lambda: _anyres(
            "LlavaNextVideoConfig", "llama", "clip_vision_model", video_token_index=VIDEO
        ),
        "LlavaNextVideoForConditionalGeneration",
        _anyres_image,
        _anyres_video(4 * 4),
    ),
    "qwen2_vl": Family(
        _qwen2_vl,
        "Qwen2VLForConditionalGeneration",
        _qwen_image,
        _qwen_video,
        token_types="mm_token_type_ids",
    ),
    "qwen3_vl": Family(
        _qwen3_vl,
        "Qwen3VLForConditionalGeneration",
        _qwen_image,
        _timed_video(VIDEO),
        token_types="mm_token_type_ids",
    ),
    "glm4v": Family(
        _glm4v,
        "Glm4vForConditionalGeneration",
        _qwen_image,
        _timed_video(IMAGE),
        token_types="mm_token_type_ids",
    ),
    "idefics3": Family(
        lambda: _idefics("Idefics3Config", "idefics3_vision"),
        "Idefics3ForConditionalGeneration",
        _square(16),
        collate=_images_per_prompt,
    ),
    "smolvlm": Family(
        lambda: _idefics("SmolVLMConfig", "smolvlm_vision"),
        "SmolVLMForConditionalGeneration",
        _square(16),
        collate=_images_per_prompt,
    ),
    "gemma3": Family(
        _gemma3, "Gemma3ForConditionalGeneration", _square(16), token_types="token_type_ids"
    ),
    "paligemma": Family(
        lambda: _paligemma("gemma"),
        "PaliGemmaForConditionalGeneration",
        _bare(16),
        token_types="token_type_ids",
        type_of={},
        several_images=False,
        image_first=True,
    ),
    "paligemma2": Family(
        lambda: _paligemma("gemma2", sliding_window=16, query_pre_attn_scalar=HEAD_DIM),
        "PaliGemmaForConditionalGeneration",
        _bare(16),
        token_types="token_type_ids",
        type_of={},
        attentions=("eager",),
        several_images=False,
        image_first=True,
    ),
    "mistral3": Family(_mistral3, "Mistral3ForConditionalGeneration", _mistral3_image),
}
