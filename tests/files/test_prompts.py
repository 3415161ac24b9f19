"""Prompts and pictures as LLaVA's scripts make them, restated from their sources."""

from __future__ import annotations

import base64
import io
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from autoprune import tiny
from autoprune.evaluation.files.prompts import (
    conversation,
    fitting,
    padding_colour,
    picture,
    prompt,
    square,
)
from autoprune.evaluation.files.questions import Question
from autoprune.evaluation.prompts import encode_texts

VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
    "detailed, and polite answers to the user's questions. USER: <image>\nWhat is it? ASSISTANT:"
)
CLIP_MEAN = [0.48145466, 0.4578275, 0.40821073]
# Of llava-hf/llava-1.5-7b-hf, in short.
LLAVA_TEMPLATE = """\
{% for message in messages %}{{ message['role'].upper() + ': ' }}\
{% for part in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\\n' }}{% endfor %}\
{% for p in message['content'] | selectattr('type', 'equalto', 'text') %}{{ p['text'] + ' ' }}{% endfor %}\
{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"""
MISTRAL_TEMPLATE = "{% for m in messages %}[INST] {{ m['content'][1]['text'] }} [/INST]{% endfor %}"


def test_vicuna_is_word_for_word_that_of_llava():
    assert prompt(SimpleNamespace(), "vicuna_v1", "What is it?", True) == VICUNA
    alone = VICUNA.replace("<image>\n", "")
    assert (
        prompt(SimpleNamespace(image_token="<image>"), "vicuna_v1", "What is it?", False) == alone
    )
    human = VICUNA.replace("curious user", "curious human").replace("the user's", "the human's")
    assert prompt(SimpleNamespace(), "llava_v1", "What is it?", True) == human


def test_names_of_conversations():
    assert [conversation(name) for name in ("v1", "vicuna_v1", "llava_v1", "template")] == [
        "vicuna_v1",
        "vicuna_v1",
        "llava_v1",
        "template",
    ]
    with pytest.raises(ValueError, match="'mpt' is not known; use vicuna_v1 or llava_v1"):
        conversation("mpt")


@pytest.mark.parametrize(
    ("own", "asked", "used"),
    [
        (LLAVA_TEMPLATE, "vicuna_v1", "vicuna_v1"),
        (None, "vicuna_v1", "vicuna_v1"),
        (MISTRAL_TEMPLATE, "vicuna_v1", "template"),
        (MISTRAL_TEMPLATE, "llava_v1", "template"),
        (LLAVA_TEMPLATE, "template", "template"),
    ],
)
def test_a_model_of_another_conversation_keeps_its_own(own, asked, used):
    processor = tiny.load()[1]
    processor.chat_template = own
    assert fitting(asked, processor) == used


def test_llavas_template_and_the_conversation_differ_in_the_system_sentence_alone():
    processor = tiny.load()[1]
    processor.chat_template = LLAVA_TEMPLATE
    assert VICUNA.endswith(prompt(processor, "template", "What is it?", True))


def test_the_embedded_model_keeps_its_own():
    assert fitting("vicuna_v1", tiny.load()[1]) == "template"


def test_a_vicuna_prompt_becomes_the_tokens_of_its_parts():
    """The placeholder becomes the picture's tokens, and what stands around it is as it is without one."""
    model, processor = tiny.load()
    text = prompt(processor, "vicuna_v1", "what color is the circle?", True)
    image = Image.new("RGB", (96, 96))
    ids = encode_texts(processor, [text], [[image]])["input_ids"][0].tolist()
    before, after = text.split("<image>")
    tokens = processor.tokenizer(before).input_ids
    tokens += [model.config.image_token_id] * 144
    tokens += processor.tokenizer(after, add_special_tokens=False).input_ids
    assert ids == tokens


def expanded(pixels, colour):
    """LLaVA's `expand2square` by a slow loop."""
    height, width, _ = pixels.shape
    side = max(height, width)
    whole = np.empty((side, side, 3), dtype=np.uint8)
    for y in range(side):
        for x in range(side):
            row, column = y - (side - height) // 2, x - (side - width) // 2
            inside = 0 <= row < height and 0 <= column < width
            whole[y, x] = pixels[row, column] if inside else colour
    return whole


@pytest.mark.parametrize(("width", "height"), [(9, 4), (4, 9), (7, 7), (8, 7), (1, 6)])
def test_a_picture_is_squared_as_llava_does(width, height):
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    squared = square(Image.fromarray(pixels), (122, 116, 104))
    assert np.array_equal(np.asarray(squared), expanded(pixels, (122, 116, 104)))


def model_and_processor(kind, **pictures):
    config = SimpleNamespace(model_type=kind)
    pictures = SimpleNamespace(image_mean=CLIP_MEAN, **pictures)
    return SimpleNamespace(config=config), SimpleNamespace(image_processor=pictures)


def test_only_models_of_one_square_picture_are_padded_for():
    # LLaVA's own demo has these numbers for the mean colour of CLIP.
    assert padding_colour(*model_and_processor("llava")) == (122, 116, 104)
    assert padding_colour(*model_and_processor("llava", do_pad=True)) is None
    assert padding_colour(*model_and_processor("llava_next")) is None
    assert padding_colour(*model_and_processor("qwen2_5_vl")) is None


def test_pictures_are_read_as_llava_reads_them(tmp_path):
    """Not turned upright, and no white behind what is transparent."""
    clear = Image.new("RGBA", (4, 2), (200, 10, 10, 0))
    exif = Image.Exif()
    exif[274] = 6
    clear.save(tmp_path / "x.png", exif=exif)
    question = Question(0, 1, image=tmp_path / "x.png")
    plain = picture(question, None, plain=True)
    assert plain.size == (4, 2) and plain.getpixel((0, 0)) == (200, 10, 10)
    own = picture(question, None, plain=False)
    assert own.size == (2, 4) and own.getpixel((0, 0)) == (255, 255, 255)
    padded = picture(question, (1, 2, 3), plain=True)
    assert padded.size == (4, 4) and padded.getpixel((0, 0)) == (1, 2, 3)


def test_pictures_in_base64_are_read():
    out = io.BytesIO()
    Image.new("RGB", (3, 2), (5, 6, 7)).save(out, "PNG")
    code = base64.b64encode(out.getvalue())
    image = picture(Question(0, 1, image=code), None, plain=True)
    assert image.size == (3, 2) and image.getpixel((2, 1)) == (5, 6, 7)
    for broken, said in ((b"?", "no base64"), (b"aGk=", "of 2 bytes is not an image")):
        with pytest.raises(ValueError, match=said):
            picture(Question(0, 1, image=broken), None, plain=True)
    assert picture(Question(0, 1), (1, 2, 3), plain=True) is None
