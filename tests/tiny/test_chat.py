"""Tokenizer, processor and chat template."""

import pytest
from transformers import AutoProcessor

from autoprune import tiny
from autoprune.tiny.recipe.chat import make_processor


@pytest.fixture(scope="module")
def processor(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processor")
    make_processor().save_pretrained(folder)
    return AutoProcessor.from_pretrained(folder, local_files_only=True)


def test_a_picture_of_any_size_becomes_144_visual_tokens(processor):
    image = tiny.draw_scene(0).image
    for picture in (image, image.resize((200, 57)), image.convert("L")):
        text = tiny.prompt(processor, "what color is the circle?")
        inputs = processor(images=picture, text=text, return_tensors="pt")
        assert inputs["pixel_values"].shape == (1, 3, 96, 96)
        assert (inputs["input_ids"] == processor.image_token_id).sum() == 144


def test_the_template_writes_several_turns(processor):
    text = tiny.prompt(processor, "how many rings are there?", (("which digit is there?", "7"),))
    assert text == (
        "<s><|user|><image> which digit is there?<|assistant|> 7</s>"
        "<|user|> how many rings are there?<|assistant|>"
    )


def test_batches_are_padded_on_the_left(processor):
    image = tiny.draw_scene(0).image
    texts = [tiny.prompt(processor, "is there a red circle?"), tiny.prompt(processor, "hi")]
    inputs = processor(images=[image, image], text=texts, padding=True, return_tensors="pt")
    assert inputs["attention_mask"][:, -1].tolist() == [1, 1]
    assert inputs["attention_mask"][1, 0] == 0


@pytest.mark.parametrize("text", [" Grüße, 東京! 1234", " what?\n\nno", " a 🙂 b"])
def test_any_text_survives_the_tokenizer(processor, text):
    tokenizer = processor.tokenizer
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_the_words_of_the_questions_are_single_tokens(processor):
    tokenizer = processor.tokenizer
    tokens = tokenizer.tokenize(" is the purple triangle left of the orange cross? 12 KT")
    assert len(tokens) == 13
    assert tokens[-2:] == ["ĠK", "T"]
    assert len(tokenizer) < 600
