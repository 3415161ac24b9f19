"""Processors for the zoo's models: the families' own classes, with a tiny vocabulary."""

from __future__ import annotations

from typing import Any
from unittest import mock

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    InternVLProcessor,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    Qwen2_5_VLProcessor,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.processing_utils import ProcessorMixin

from tests.zoo_pictures import (
    BOS,
    END,
    GRID_PATCH,
    IMAGE,
    PAD,
    PATCH,
    START,
    VIDEO,
    VOCABULARY,
)

# What the families call their tokens of media: image, video, start and end of a picture.
TOKENS = {
    "llava": ("<image>", "<video>", "<start>", "<end>"),
    "qwen2_5_vl": ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"),
    "internvl": ("<IMG_CONTEXT>", "<video>", "<img>", "</img>"),
}
# What a template writes in the place of a picture.
PLACES = {
    "llava": "<image>",
    "qwen2_5_vl": "<|vision_start|><|image_pad|><|vision_end|>",
    "internvl": "<IMG_CONTEXT>",
}
TEMPLATE = """\
<s>{% for message in messages %}{% for part in message['content'] %}\
{% if part['type'] == 'image' %}PLACE{% else %}{{ ' ' + part['text'] }}{% endif %}\
{% endfor %}{% endfor %}{% if add_generation_prompt %} :{% endif %}"""


def processor(family: str) -> Any:
    """The processor of one of `TOKENS`, for pictures as small as the zoo's models take.

    Videos need torchvision, which the tests do without: there is no processor for them.
    """
    # Construction checks its parts, also those that are not there.
    with mock.patch.object(ProcessorMixin, "check_argument_for_proper_class"):
        return _PROCESSORS[family](_tokenizer(family), TEMPLATE.replace("PLACE", PLACES[family]))


def _llava(tokenizer: Any, template: str) -> Any:
    size = {"height": 56, "width": 56}
    pictures = CLIPImageProcessorPil(size=size, crop_size=size, do_center_crop=False)
    return LlavaProcessor(
        pictures,
        tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template,
    )


def _qwen(tokenizer: Any, template: str) -> Any:
    area = {"shortest_edge": (4 * GRID_PATCH) ** 2, "longest_edge": (8 * GRID_PATCH) ** 2}
    pictures = Qwen2VLImageProcessorPil(
        size=area, patch_size=GRID_PATCH, merge_size=2, temporal_patch_size=2
    )
    return Qwen2_5_VLProcessor(pictures, tokenizer, chat_template=template)


def _internvl(tokenizer: Any, template: str) -> Any:
    pictures = GotOcr2ImageProcessorPil(size={"height": 56, "width": 56}, crop_to_patches=False)
    return InternVLProcessor(pictures, tokenizer, image_seq_length=16, chat_template=template)


_PROCESSORS = {"llava": _llava, "qwen2_5_vl": _qwen, "internvl": _internvl}


def _tokenizer(family: str) -> PreTrainedTokenizerFast:
    """Words of one vocabulary, with the family's special tokens where the zoo's models expect them."""
    image, video, start, end = TOKENS[family]
    special = {"<pad>": PAD, "<s>": BOS, image: IMAGE, video: VIDEO, start: START, end: END}
    free = (n for n in range(VOCABULARY) if n not in special.values())
    words = (
        "<unk>",
        *["What", "is", "on", "the", "table", "?", ":"],
        *(f"w{n}" for n in range(VOCABULARY)),
    )
    vocabulary = special | dict(zip(words, free, strict=False))
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.decoder = decoders.Fuse()
    names = {
        "llava": {"image_token": image},
        "qwen2_5_vl": {"image_token": image, "video_token": video},
        "internvl": {
            "context_image_token": image,
            "video_token": video,
            "start_image_token": start,
            "end_image_token": end,
        },
    }
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<s>",
        unk_token="<unk>",
        padding_side="left",
        extra_special_tokens=names[family],
        additional_special_tokens=[start, end],
    )
