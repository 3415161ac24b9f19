"""Pictures that are encoded once and asked about many times."""

from __future__ import annotations

import functools
import inspect

import pytest
import torch

import autoprune
from autoprune import AutoPrune, Budget
from autoprune.errors import UnsupportedError
from tests import oracle, zoo

model_of = functools.cache(zoo.build)
TAKES_FEATURES = "mm_encoder_outputs" in inspect.signature(model_of("llava").forward).parameters
needs_features = pytest.mark.skipif(
    not TAKES_FEATURES, reason="this transformers takes no features"
)
METHODS = [
    AutoPrune(Budget.ratio(0.4)),
    AutoPrune(Budget.ratio(0.3), first_cut="pre_llm"),
    autoprune.create("hiprune", Budget.ratio(0.5)),
    autoprune.create("visionzip", Budget.ratio(0.5)),
]


def encoded(model, method, inputs):
    """The inputs with features in the place of pixels."""
    handle = method.attach(model)
    try:
        with torch.no_grad():
            features = handle.encode(**inputs)
    finally:
        handle.detach()
    rest = {name: value for name, value in inputs.items() if "pixel_values" not in name}
    return {**rest, "mm_encoder_outputs": features}


@needs_features
@pytest.mark.parametrize("batch", ["single", "padded3_text"])
@pytest.mark.parametrize("method", METHODS, ids=lambda m: f"{m.name}-{m.budget.value}")
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "internvl", "llava_next"])
def test_features_bring_along_what_was_seen_of_the_tower(name, method, batch):
    model = model_of(name)
    inputs = zoo.inputs(name, model, batch)
    with method(model) as trace:
        logits, tokens = oracle.generate_logits(model, inputs, steps=2)
    reused = encoded(model, method, inputs)
    for _ in range(2):
        with method(model) as again:
            same_logits, same_tokens = oracle.generate_logits(model, reused, steps=2)
        assert torch.equal(same_tokens, tokens)
        torch.testing.assert_close(same_logits, logits, atol=1e-4, rtol=0)
        for sample, expected in zip(again.samples, trace.samples, strict=True):
            assert [k.tolist() for k in sample.kept] == [k.tolist() for k in expected.kept]


@needs_features
def test_features_of_one_question_serve_another():
    model = model_of("llava")
    first, second = (zoo.inputs("llava", model, "padded3", only=row) for row in (0, 0))
    second["input_ids"] = second["input_ids"].clone()
    second["input_ids"][:, -2:] = second["input_ids"][:, -2:].flip(1)
    reused = encoded(model, METHODS[0], first)
    with METHODS[0](model) as trace, torch.no_grad():
        expected = model(**second).logits
        features = reused["mm_encoder_outputs"]
        text = {name: value for name, value in second.items() if name != "pixel_values"}
        actual = model(**text, mm_encoder_outputs=features).logits
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=0)
    assert trace.samples[0].kept[3].tolist() == trace.samples[1].kept[3].tolist()


@needs_features
def test_features_outlast_beams():
    model = model_of("llava")
    reused = encoded(model, METHODS[0], zoo.inputs("llava", model, "padded3_text"))
    options = {"max_new_tokens": 3, "do_sample": False}
    with METHODS[0](model), torch.no_grad():
        greedy = model.generate(**reused, **options)
        beams = [model.generate(**reused, **options, num_beams=2) for _ in range(2)]
        again = model.generate(**reused, **options)
    assert torch.equal(*beams) and torch.equal(greedy, again)


@needs_features
def test_features_leave_out_what_only_the_tower_needed():
    model = model_of("llava")
    features = encoded(model, METHODS[0], zoo.inputs("llava", model))["mm_encoder_outputs"]
    assert set(features["image"]) == {"pooler_output"}


def test_encoding_without_pruning_or_without_support_is_refused():
    model = model_of("llava")
    handle = METHODS[0](model)
    with pytest.raises(UnsupportedError, match=r"attach and detach|pixel values each time"):
        handle.encode(**zoo.inputs("llava", model))


@needs_features
@pytest.mark.parametrize(
    ("inputs", "got"),
    [
        ({"input_ids": torch.tensor([[1, 2]])}, "but got input_ids; pass all that"),
        ({"pixel_values": None}, "but got pixel_values; pass all that"),
        ({}, "but got nothing; pass all that"),
    ],
)
def test_encoding_without_pictures_is_refused(inputs, got):
    handle = METHODS[0].attach(model_of("llava"))
    try:
        with pytest.raises(ValueError, match=got):
            handle.encode(**inputs)
    finally:
        handle.detach()


@needs_features
def test_encoding_a_video_for_a_model_of_pictures_is_refused():
    handle = METHODS[0].attach(model_of("llava"))
    try:
        with pytest.raises(UnsupportedError, match="LlavaModel takes no videos"):
            handle.encode(pixel_values_videos=torch.zeros(1, 2, 3, 56, 56))
    finally:
        handle.detach()
