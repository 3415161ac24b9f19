"""The shipped weights: size, architecture, and what they know."""

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, LlavaForConditionalGeneration

from autoprune import tiny
from autoprune.tiny.recipe.evaluate import accuracy
from tests.tiny.scene_objects import of_kind


@pytest.fixture(scope="module")
def embedded():
    torch.set_num_threads(1)
    return tiny.load()


def test_the_weights_are_small_and_half_precision():
    weights = tiny.path() / "model.safetensors"
    assert 4_000_000 < weights.stat().st_size <= 8_000_000
    model = AutoModelForImageTextToText.from_pretrained(tiny.path(), local_files_only=True)
    assert model.dtype is torch.float16


def test_it_is_an_ordinary_llava_with_144_tokens_and_16_layers(embedded):
    model, processor = embedded
    assert isinstance(model, LlavaForConditionalGeneration) and not model.training
    assert model.dtype is torch.float32
    assert model.config.text_config.num_hidden_layers == 16
    assert type(processor) is type(AutoProcessor.from_pretrained(tiny.path()))
    inputs = processor(
        images=tiny.draw_scene(0).image, text=tiny.prompt(processor, "?"), return_tensors="pt"
    )
    assert (inputs["input_ids"] == model.config.image_token_id).sum() == 144
    assert model.config.vision_feature_select_strategy == "default"


def test_it_answers_heldout_questions(embedded):
    result = accuracy(*embedded, tiny.heldout_questions(72, seed=3), batch_size=36)
    assert result.accuracy(tiny.EASY) >= 0.93
    assert result.accuracy(tiny.HARD) >= 0.80


def test_it_answers_a_second_turn_on_the_same_picture(embedded):
    model, processor = embedded
    right = 0
    for scene, question in tiny.heldout_questions(12, ["shape"], seed=4):
        (earlier,) = tiny.ask(scene, 0, ["exists"])
        text = tiny.prompt(processor, question.text, ((earlier.text, earlier.answer),))
        inputs = processor(images=scene.image, text=text, return_tensors="pt")
        ids = model.generate(**inputs, max_new_tokens=6, do_sample=False)
        reply = processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        right += tiny.is_correct(question, reply)
    assert right >= 10


def test_it_describes_a_picture_in_a_long_answer(embedded):
    scene = tiny.draw_scene(2)
    text = tiny.answer(*embedded, scene.image, "what is in the picture?")
    found = {item.colour for item in of_kind(scene, "shape")}
    assert sum(colour in text for colour in found) >= len(found) - 1
    assert text.endswith(".") and text.count(",") == len(scene.objects) - 1


def test_missing_weights_are_named_with_the_way_out(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"python -m autoprune\.tiny\.recipe\.train"):
        tiny.load(folder=tmp_path)
