"""Placeholders without pictures: plain words to transformers, and to pruning."""

from __future__ import annotations

import functools

import pytest
import torch

from autoprune import AutoPrune, Budget, create
from tests import oracle, zoo

METHOD = AutoPrune(Budget.ratio(0.4))
model_of = functools.cache(zoo.build)


def without_pictures(inputs):
    """The words alone."""
    return {
        name: value for name, value in inputs.items() if name in ("input_ids", "attention_mask")
    }


@pytest.mark.parametrize("batch", ["single", "padded3"])
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "internvl", "gemma3"])
def test_placeholders_without_pixels_are_left_whole(name, batch):
    model = model_of(name, "sdpa")
    inputs = without_pictures(zoo.inputs(name, model, batch))
    plain, said = oracle.generate_logits(model, inputs, steps=2)
    with METHOD(model) as trace:
        logits, tokens = oracle.generate_logits(model, inputs, steps=2)
    assert torch.equal(logits, plain) and torch.equal(tokens, said)
    for sample, real in zip(trace.samples, inputs["attention_mask"], strict=True):
        assert (sample.num_visual, sample.num_text) == (0, int(real.sum()))
        assert sample.tokens_per_layer == [0] * zoo.LAYERS


@pytest.mark.parametrize("name", ["autoprune", "fastv", "divprune", "tome"])
def test_a_video_token_without_a_video_is_a_word_beside_pictures(name):
    model = model_of("qwen2_5_vl", "sdpa")
    inputs = zoo.inputs("qwen2_5_vl", model, "padded3_text")
    word = inputs["input_ids"].clone()
    # The prompt in the middle has no picture, and now placeholders of a video.
    word[1, -4:-1] = model.config.video_token_id
    changed = inputs | {"input_ids": word}
    with create(name, Budget.ratio(0.5))(model) as trace:
        logits, tokens = oracle.generate_logits(model, changed, steps=2)
    assert [bool(sample.num_visual) for sample in trace.samples] == [True, False, True]
    columns = oracle.columns_from_trace(trace.samples, inputs["attention_mask"], zoo.LAYERS)
    assert columns[-1][1].sum() == inputs["attention_mask"][1].sum()
    if name != "tome":
        expected = oracle.oracle_logits(model, changed, columns, tokens[:, :2])
        assert (logits - expected).abs().max() < 3e-4


def test_an_image_token_without_an_image_is_a_word_beside_videos():
    model = model_of("qwen2_5_vl", "sdpa")
    inputs = zoo.inputs("qwen2_5_vl", model, "single", media="video")
    whole = zoo.visual_mask(model, inputs["input_ids"]).sum().item()
    inputs["input_ids"][0, -2] = model.config.image_token_id
    with METHOD(model) as trace:
        logits, tokens = oracle.generate_logits(model, inputs, steps=1)
    assert trace.samples[0].num_visual == whole
    columns = oracle.columns_from_trace(trace.samples, inputs["attention_mask"], zoo.LAYERS)
    expected = oracle.oracle_logits(model, inputs, columns, tokens[:, :1])
    assert (logits - expected).abs().max() < 3e-4


def test_frames_that_are_written_with_the_images_token_are_visual():
    model = model_of("glm4v", "sdpa")
    inputs = zoo.inputs("glm4v", model, "single", media="video")
    with METHOD(model) as trace, torch.no_grad():
        model(**inputs)
    assert trace.samples[0].num_visual == zoo.visual_mask(model, inputs["input_ids"]).sum()


def test_a_visual_mask_needs_no_pixels():
    model = model_of("llava", "sdpa")
    inputs = zoo.inputs("llava", model, "single")
    mask = zoo.visual_mask(model, inputs["input_ids"])
    embeds = model.get_input_embeddings()(inputs["input_ids"]).detach()
    with METHOD(model, visual_mask=mask) as trace, torch.no_grad():
        model(inputs_embeds=embeds, attention_mask=inputs["attention_mask"])
    assert trace.samples[0].num_visual == mask.sum()
    assert sum(trace.samples[0].tokens_per_layer) == round(0.4 * zoo.LAYERS * int(mask.sum()))


def test_pixels_given_by_place_count_as_pictures():
    model = model_of("llava", "sdpa")
    inputs = zoo.inputs("llava", model, "single")
    with METHOD(model) as trace, torch.no_grad():
        named = model.model(input_ids=inputs["input_ids"], pixel_values=inputs["pixel_values"])
        placed = model.model(inputs["input_ids"], inputs["pixel_values"])
    assert torch.equal(named.last_hidden_state, placed.last_hidden_state)
    assert trace.samples[0].num_visual == trace.samples[1].num_visual > 0
