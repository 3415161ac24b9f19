"""Prompts of CogVLM: exact ids of each template, and pixels."""

from __future__ import annotations

from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.processing_utils import ProcessorMixin

from autoprune.models import register
from autoprune.models.cogvlm import CogVLMProcessor
from autoprune.models.cogvlm.processing import TEMPLATES, add_tokens
from tests.models.cogvlm_checkpoint import PATCH, SIDE, VOCABULARY, tokenizer

# Four patches, so that a prompt can be written out: boi, patches, eoi.
SHOWN = [VOCABULARY + 1, *[VOCABULARY] * 4, VOCABULARY + 2]
BOS, QUESTION, COLON, ANSWER, SHORT, SHORT_ANSWER, WHAT, MARK, A, CAT = (
    1,
    3,
    4,
    5,
    6,
    7,
    8,
    9,
    10,
    11,
)


def make(template: str = "chat", side: int = 2 * PATCH) -> CogVLMProcessor:
    words = tokenizer()
    words.pad_token = "<unk>"
    add_tokens(words)
    size = {"height": side, "width": side}
    pictures = CLIPImageProcessorPil(size=size, crop_size=size, do_center_crop=False)
    with mock.patch.object(ProcessorMixin, "check_argument_for_proper_class"):
        return CogVLMProcessor(pictures, words, TEMPLATES[template], PATCH)


def asked(*contents: object) -> list[dict]:
    roles = ["user", "assistant"] * len(contents)
    return [{"role": role, "content": c} for role, c in zip(roles, contents, strict=False)]


def ids(processor: CogVLMProcessor, conversation: list[dict]) -> list[int]:
    encoded = processor.apply_chat_template(
        conversation, add_generation_prompt=True, tokenize=True, return_dict=True
    )
    return encoded["input_ids"][0]


def picture(width: int = 30, height: int = 20) -> Image.Image:
    noise = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(noise)


WHAT_CAT = [{"type": "image", "image": picture()}, {"type": "text", "text": "what cat ?"}]


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("chat", [QUESTION, COLON, WHAT, CAT, MARK, ANSWER, COLON]),
        ("vqa", [QUESTION, COLON, WHAT, CAT, MARK, SHORT, SHORT_ANSWER, COLON]),
        ("base", [WHAT, CAT, MARK]),
    ],
)
def test_the_ids_of_a_question_about_a_picture(template, expected):
    processor = make(template)
    assert ids(processor, asked(WHAT_CAT)) == [BOS, *SHOWN, *expected]
    assert ids(processor, asked("what cat ?")) == [BOS, *expected]
    # The picture stands in front, wherever it was named.
    assert ids(processor, asked(WHAT_CAT[::-1])) == [BOS, *SHOWN, *expected]


@pytest.mark.parametrize(("template", "answer"), [("chat", "Answer:"), ("vqa", "Short answer:")])
def test_the_text_of_a_conversation(template, answer):
    conversation = asked(WHAT_CAT, "a cat", [{"type": "text", "text": "what ?"}])
    text = make(template).apply_chat_template(conversation)
    assert text == f"<image>Question: what cat ? {answer} a cat\nQuestion: what ? {answer}"


def test_prompts_with_and_without_a_picture_are_padded_on_the_left():
    processor = make()
    batch = processor(
        images=[picture()],
        text=["a cat", "<image>what"],
        padding=True,
        return_tensors="pt",
    )
    short = [BOS, A, CAT]
    long = [BOS, *SHOWN, WHAT]
    missing = len(long) - len(short)
    assert batch["input_ids"].tolist() == [[0] * missing + short, long]
    assert batch["attention_mask"].tolist() == [[0] * missing + [1] * 3, [1] * len(long)]
    assert batch["pixel_values"].shape == (1, 3, 2 * PATCH, 2 * PATCH)
    assert processor.batch_decode(batch["input_ids"], skip_special_tokens=True) == ["acat", "what"]


def test_a_picture_is_stretched_to_the_square_and_normalised_as_for_clip():
    shown = picture()
    made = make(side=SIDE)(images=shown, text="<image>", return_tensors="pt")["pixel_values"][0]
    pixels = np.asarray(shown.resize((SIDE, SIDE), Image.Resampling.BICUBIC)) / 255
    mean = np.array([0.48145466, 0.4578275, 0.40821073])
    deviation = np.array([0.26862954, 0.26130258, 0.27577711])
    expected = torch.tensor((pixels - mean) / deviation).permute(2, 0, 1).float()
    torch.testing.assert_close(made, expected, atol=1e-5, rtol=0)


def test_it_is_saved_and_found_again_with_its_template(tmp_path):
    register()
    register()
    make("vqa").save_pretrained(tmp_path)
    again = AutoProcessor.from_pretrained(tmp_path)
    assert isinstance(again, CogVLMProcessor)
    expected = [BOS, *SHOWN, QUESTION, COLON, WHAT, CAT, MARK, SHORT, SHORT_ANSWER, COLON]
    assert ids(again, asked(WHAT_CAT)) == expected


def test_what_a_prompt_cannot_hold_is_refused_in_a_sentence():
    processor = make()
    two = [picture(), picture()]
    with pytest.raises(ValueError, match=r"CogVLM takes one picture in a prompt, but one has 2; "):
        processor(images=two, text="<image><image>what")
    with pytest.raises(ValueError, match=r"2 pictures came with prompts that have 1 places"):
        processor(images=two, text=["<image>what", "a cat"])
    with pytest.raises(ValueError, match=r"0 pictures came with prompts that have 1 places"):
        processor(text="<image>what")
    with pytest.raises(ValueError, match="needs text"):
        processor(images=two)
    with pytest.raises(Exception, match="no messages of the role system"):
        processor.apply_chat_template([{"role": "system", "content": "be a cat"}])
    with pytest.raises(ValueError, match=r"no token '<image>'.*add_tokens"):
        CogVLMProcessor(processor.image_processor, tokenizer())
