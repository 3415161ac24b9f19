"""Tiny checkpoints of random weights, one for each family, with processors as the real ones have."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import (
    CLIPImageProcessor,
    GotOcr2ImageProcessor,
    LlavaNextImageProcessor,
    PreTrainedTokenizerFast,
    Qwen2VLImageProcessor,
)
from transformers.models.internvl.video_processing_internvl import InternVLVideoProcessor
from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor
from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor

from autoprune import tiny

HIDDEN, HEADS, HEAD_DIM, PATCH, SIDE = 64, 2, 32, 8, 64
# Names of tokens: image, video, start and end of a picture; and how a picture is written in a prompt.
TOKENS = {
    "llava": ("<image>", "<video>", "<start>", "<end>"),
    "llava_next": ("<image>", "<video>", "<start>", "<end>"),
    "qwen2_5_vl": ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"),
    "qwen3_vl": ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"),
    "internvl": ("<IMG_CONTEXT>", "<video>", "<img>", "</img>"),
}
PICTURE = {
    "llava": "<image>",
    "llava_next": "<image>",
    "qwen2_5_vl": "<|vision_start|><|image_pad|><|vision_end|>",
    "qwen3_vl": "<|vision_start|><|image_pad|><|vision_end|>",
    "internvl": "<IMG_CONTEXT>",
}
TEMPLATE = """\
{{ '<s>' }}{% for message in messages %}{% for part in message['content'] %}\
{% if part['type'] == 'image' %}PICTURE{% else %}{{ ' ' + part['text'] }}{% endif %}\
{% endfor %}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"""


def tokenizer(family: str) -> PreTrainedTokenizerFast:
    """The embedded model's words, with the tokens of the family."""
    image, video, start, end = TOKENS[family]
    words = PreTrainedTokenizerFast(
        tokenizer_file=str(tiny.path() / "tokenizer.json"),
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        extra_special_tokens={
            "image_token": image,
            "video_token": video,
            "context_image_token": image,
            "start_image_token": start,
            "end_image_token": end,
        },
    )
    words.add_special_tokens({"additional_special_tokens": [image, video, start, end]})
    return words


def build(family: str, folder: Path, side: int = SIDE, patch: int = PATCH, **changes: Any) -> Path:
    """Write the checkpoint of a family into a folder, and say where it is.

    Args:
        side, patch: pixels along the side of a picture and of a patch, for LLaVA-1.5.
        changes: of its text and vision configuration, for LLaVA-1.5.
    """
    words = tokenizer(family)
    ids = [words.convert_tokens_to_ids(token) for token in TOKENS[family]]
    torch.manual_seed(1)
    config = _CONFIGS[family](ids, len(words), **changes)
    model = transformers.AutoModelForImageTextToText.from_config(config).float()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim > 1:
                # Large weights: answers that depend on every token.
                weight.normal_(std=0.15 if "embed" not in name else 0.5)
            elif "norm" not in name:
                weight.normal_(std=0.1)
    model.generation_config = transformers.GenerationConfig(
        bos_token_id=1, eos_token_id=None, pad_token_id=0
    )
    model.save_pretrained(folder)
    processor = _PROCESSORS[family](words, TEMPLATE.replace("PICTURE", PICTURE[family]))
    if (side, patch) != (SIDE, PATCH):
        size = {"height": side, "width": side}
        processor.image_processor.size = processor.image_processor.crop_size = size
        processor.patch_size = patch
    processor.save_pretrained(folder)
    return folder


def _text(kind: str, vocabulary: int, **changes: Any) -> dict[str, Any]:
    base = {
        "model_type": kind,
        "vocab_size": vocabulary,
        "hidden_size": HIDDEN,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS,
        "head_dim": HEAD_DIM,
        "max_position_embeddings": 1024,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": None,
        "pad_token_id": 0,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    }
    return base | changes


def _clip(**changes: Any) -> dict[str, Any]:
    base = {
        "model_type": "clip_vision_model",
        "hidden_size": HIDDEN,
        "intermediate_size": 96,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "image_size": SIDE,
        "patch_size": PATCH,
    }
    return base | changes


def _llava(ids: list[int], vocabulary: int, **changes: Any) -> Any:
    return transformers.LlavaConfig(
        text_config=_text("llama", vocabulary, **changes.get("text", {})),
        vision_config=(vision := _clip(**changes.get("vision", {}))),
        image_token_index=ids[0],
        image_seq_length=(vision["image_size"] // vision["patch_size"]) ** 2,
        tie_word_embeddings=False,
    )


def _llava_next(ids: list[int], vocabulary: int) -> Any:
    return transformers.LlavaNextConfig(
        text_config=_text("llama", vocabulary),
        vision_config=_clip(image_size=32),
        image_token_index=ids[0],
        image_grid_pinpoints=[[32, 64], [64, 32], [64, 64]],
        image_seq_length=16,
        tie_word_embeddings=False,
    )


def _qwen2_5(ids: list[int], vocabulary: int) -> Any:
    return _qwen(
        transformers.Qwen2_5_VLConfig,
        "qwen2_5_vl_text",
        ids,
        vocabulary,
        intermediate_size=96,
        window_size=32,
        fullatt_block_indexes=[1, 3],
    )


def _qwen3(ids: list[int], vocabulary: int) -> Any:
    return _qwen(
        transformers.Qwen3VLConfig,
        "qwen3_vl_text",
        ids,
        vocabulary,
        intermediate_size=96,
        num_position_embeddings=64,
        deepstack_visual_indexes=[0, 1, 2],
    )


def _qwen(cls: Any, text: str, ids: list[int], vocabulary: int, **vision: Any) -> Any:
    image, video, start, end = ids
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 6, 6]}
    if text == "qwen3_vl_text":
        rope["mrope_interleaved"] = True
    tower = {
        "depth": 4,
        "hidden_size": HIDDEN,
        "num_heads": 2,
        "patch_size": PATCH,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "in_channels": 3,
        "out_hidden_size": HIDDEN,
    }
    return cls(
        text_config=_text(text, vocabulary, rope_parameters=rope),
        vision_config=tower | vision,
        image_token_id=image,
        video_token_id=video,
        vision_start_token_id=start,
        vision_end_token_id=end,
        tie_word_embeddings=False,
    )


def _internvl(ids: list[int], vocabulary: int) -> Any:
    return transformers.InternVLConfig(
        text_config=_text("qwen2", vocabulary),
        vision_config={
            "model_type": "internvl_vision",
            "hidden_size": HIDDEN,
            "intermediate_size": 96,
            "num_hidden_layers": 4,
            "num_attention_heads": 2,
            "image_size": [SIDE, SIDE],
            "patch_size": [PATCH, PATCH],
            "use_qk_norm": True,
        },
        image_token_id=ids[0],
        image_seq_length=(SIDE // PATCH // 2) ** 2,
        tie_word_embeddings=False,
    )


def _clip_processor(words: Any, template: str) -> Any:
    size = {"height": SIDE, "width": SIDE}
    return transformers.LlavaProcessor(
        CLIPImageProcessor(size=size, crop_size=size, do_center_crop=False),
        words,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template,
    )


def _next_processor(words: Any, template: str) -> Any:
    pictures = LlavaNextImageProcessor(
        size={"shortest_edge": 32},
        crop_size={"height": 32, "width": 32},
        image_grid_pinpoints=[[32, 64], [64, 32], [64, 64]],
    )
    return transformers.LlavaNextProcessor(
        pictures,
        words,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template,
    )


def _qwen_processor(cls: Any, video: Any) -> Callable[[Any, str], Any]:
    def make(words: Any, template: str) -> Any:
        area = {"shortest_edge": (4 * PATCH) ** 2, "longest_edge": (14 * PATCH) ** 2}
        options = {"size": area, "patch_size": PATCH, "merge_size": 2, "temporal_patch_size": 2}
        return cls(
            Qwen2VLImageProcessor(**options), words, video(**options), chat_template=template
        )

    return make


def _internvl_processor(words: Any, template: str) -> Any:
    size = {"height": SIDE, "width": SIDE}
    pictures = GotOcr2ImageProcessor(size=size, crop_to_patches=True, min_patches=1, max_patches=3)
    return transformers.InternVLProcessor(
        pictures,
        words,
        InternVLVideoProcessor(size=size),
        image_seq_length=(SIDE // PATCH // 2) ** 2,
        chat_template=template,
    )


_CONFIGS: dict[str, Callable[..., Any]] = {
    "llava": _llava,
    "llava_next": _llava_next,
    "qwen2_5_vl": _qwen2_5,
    "qwen3_vl": _qwen3,
    "internvl": _internvl,
}
_PROCESSORS: dict[str, Callable[[Any, str], Any]] = {
    "llava": _clip_processor,
    "llava_next": _next_processor,
    "qwen2_5_vl": _qwen_processor(transformers.Qwen2_5_VLProcessor, Qwen2VLVideoProcessor),
    "qwen3_vl": _qwen_processor(transformers.Qwen3VLProcessor, Qwen3VLVideoProcessor),
    "internvl": _internvl_processor,
}
