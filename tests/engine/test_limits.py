"""What cannot be right is refused before it runs, and says why."""

from __future__ import annotations

import functools

import pytest
import torch

import autoprune
from autoprune import AutoPrune, Budget
from autoprune.errors import UnsupportedError
from tests import oracle, zoo
from tests.scattered import DEEP, Scattered

METHOD = Scattered(DEEP)
model_of = functools.cache(zoo.build)


@pytest.fixture(params=zoo.EVERY_MODE)
def name(request):
    return request.param


@pytest.fixture
def model(name):
    return model_of(name, "sdpa")


@pytest.fixture
def inputs(name, model):
    return zoo.inputs(name, model, "padded3")


def embedded(model, inputs):
    """The same prompt as embeddings, pictures included."""
    seen = {}
    hook = model.get_decoder().register_forward_pre_hook(
        lambda _, args, kwargs: seen.update(kwargs), with_kwargs=True
    )
    with hook, torch.no_grad():
        model(**inputs, use_cache=False)
    names = ("inputs_embeds", "attention_mask", "position_ids")
    return {key: seen[key] for key in names if seen[key] is not None}


def test_embeddings_alone_do_not_say_what_is_visual(model, inputs):
    with pytest.raises(UnsupportedError, match="visual_mask"), METHOD(model):
        model(**embedded(model, inputs))


def test_embeddings_with_a_visual_mask_equal_the_oracle(model, inputs):
    prompt = embedded(model, inputs)
    mask = zoo.visual_mask(model, inputs["input_ids"])
    with METHOD(model, visual_mask=mask) as trace, torch.no_grad():
        actual = model(**prompt).logits[:, -1]
    columns = oracle.columns_from_trace(trace.samples, inputs["attention_mask"], zoo.LAYERS)
    expected = oracle.oracle_logits(model, inputs, columns)[:, 0]
    assert min(s.tokens_per_layer[-1] for s in trace.samples) < 16
    torch.testing.assert_close(actual, expected, atol=2e-4, rtol=0)


def test_new_pictures_in_a_later_turn(model, inputs):
    twice = torch.cat([inputs["attention_mask"]] * 2, dim=1)
    with METHOD(model):
        cache = oracle.Conversation(model, inputs).cache
        with pytest.raises(UnsupportedError, match="one prompt"):
            model(**inputs | {"attention_mask": twice}, past_key_values=cache, use_cache=True)


def test_a_chunked_prefill(model, inputs):
    with pytest.raises(UnsupportedError, match="chunk"), METHOD(model):
        model.generate(**inputs, max_new_tokens=2, prefill_chunk_size=16)


@pytest.mark.parametrize("family", ["gemma3", "llava_sliding"])
def test_static_caches_with_sliding_layers(family):
    model = model_of(family, "sdpa")
    inputs = zoo.inputs(family, model, "padded3")
    with pytest.raises(UnsupportedError, match="sliding"), METHOD(model):
        model.generate(
            **inputs, max_new_tokens=2, cache_implementation="static", disable_compile=True
        )


def test_training_mode(name, inputs):
    model = zoo.build(name, "sdpa").train()
    with pytest.raises(UnsupportedError, match="eval"), METHOD(model):
        model(**inputs)


def test_a_second_context_on_one_model(model, inputs):
    before = oracle.plain_logits(model, inputs)
    with METHOD(model) as trace:
        with pytest.raises(UnsupportedError, match="already"), METHOD(model):
            pass
        pruned = oracle.manual_logits(model, inputs, inputs["input_ids"][:, :0])
    assert len(trace.samples) == 3
    assert (pruned[:, 0] - before[:, 0]).abs().max() > 1.0
    assert torch.equal(oracle.plain_logits(model, inputs), before)


def compiled_by_itself(model, part):
    """A part of the model compiled in one of the ways there are."""
    text = model.get_decoder()
    if part == "decoder":
        text.compile(backend="eager")
    elif part == "decoder's forward":
        text.forward = torch.compile(text.forward, backend="eager")
    elif part == "layers":
        for layer in text.layers:
            layer.compile(backend="eager")
    elif part == "a layer in its place":
        text.layers[2] = torch.compile(text.layers[2], backend="eager")
    elif part == "attention":
        attention = text.layers[1].self_attn
        attention.forward = torch.compile(attention.forward, backend="eager")
    else:
        tower = model.get_encoder(modality="image")
        tower.forward = torch.compile(tower.forward, backend="eager")


@pytest.mark.parametrize("batch", ["single", "padded3"])
@pytest.mark.parametrize(
    "part",
    ["decoder", "decoder's forward", "layers", "a layer in its place", "attention", "tower"],
)
def test_parts_of_the_model_that_are_compiled_by_themselves(part, batch):
    model = zoo.build("llava", "sdpa")
    inputs = zoo.inputs("llava", model, batch)
    compiled_by_itself(model, part)
    with (
        pytest.raises(UnsupportedError, match=r"compiled by itself .*static_cache"),
        AutoPrune(Budget.ratio(0.5))(model),
        torch.no_grad(),
    ):
        model(**inputs)


def test_a_compiled_tower_is_none_of_a_methods_business_that_does_not_look_at_it():
    model = zoo.build("llava", "sdpa")
    inputs = zoo.inputs("llava", model)
    compiled_by_itself(model, "tower")
    with autoprune.create("random", budget=8)(model) as trace, torch.no_grad():
        model(**inputs)
    assert trace.samples[0].tokens_per_layer == [8] * zoo.LAYERS


@pytest.mark.parametrize("positions", ["original", "compacted"])
def test_compiled_decoding_on_a_cache_that_grows(positions):
    model = zoo.build("llava", "sdpa")
    inputs = zoo.inputs("llava", model, "padded3")
    step = torch.compile(model.forward, backend="eager", dynamic=True)
    with Scattered(DEEP, positions=positions)(model), torch.no_grad():
        cache = oracle.Conversation(model, inputs).cache
        mask = torch.cat([inputs["attention_mask"], torch.ones(3, 1, dtype=torch.long)], dim=1)
        with pytest.raises(UnsupportedError, match="needs a static cache"):
            step(input_ids=mask[:, -1:] + 20, attention_mask=mask, past_key_values=cache)


def test_compiled_decoding_on_a_growing_cache_behind_a_step_that_needed_no_hooks():
    """The layers have no hooks any more; it is refused all the same."""
    model = zoo.build("llava", "sdpa")
    inputs = zoo.inputs("llava", model, "single")
    step = torch.compile(model.forward, backend="eager", dynamic=True)
    with METHOD(model), torch.no_grad():
        cache = oracle.Conversation(model, inputs).cache
        for turn, run in enumerate((model, step)):
            mask = torch.ones(1, inputs["input_ids"].shape[1] + turn + 1, dtype=torch.long)
            given = {"input_ids": mask[:, -1:] + 20, "attention_mask": mask}
            if run is model:
                run(**given, past_key_values=cache)
                assert not model.get_decoder().layers[0]._forward_pre_hooks
            else:
                with pytest.raises(UnsupportedError, match="needs a static cache"):
                    run(**given, past_key_values=cache)


def test_compacted_positions_of_layers_with_rotations_of_their_own():
    model = model_of("gemma3", "sdpa")
    with pytest.raises(UnsupportedError, match="positions='original'"):
        Scattered(DEEP, positions="compacted")(model)


def test_another_attention_backend_inside_the_context():
    model = zoo.build("llava", "sdpa")
    inputs = zoo.inputs("llava", model, "padded3")
    handle = METHOD.attach(model)
    try:
        model.set_attn_implementation("eager")
        with pytest.raises(UnsupportedError, match="changed from 'sdpa' to 'eager'"):
            model(**inputs)
    finally:
        handle.detach()
    with METHOD(model) as trace, torch.no_grad():
        model(**inputs)
    assert len(trace.samples) == 3


def test_a_picture_without_a_word_is_not_dropped_whole():
    model = model_of("llava", "sdpa")
    inputs = zoo.inputs("llava", model)
    visual = zoo.visual_mask(model, inputs["input_ids"])
    for name in ("input_ids", "attention_mask"):
        inputs[name] = inputs[name][visual][None]
    method = autoprune.create("no_image", budget=1)
    with method(model) as trace, torch.no_grad():
        logits = model(**inputs).logits
    assert trace.samples[0].tokens_per_layer == [1] * zoo.LAYERS
    assert logits[0, -1].abs().max() > 0


def test_a_compiled_decoder_may_read_text():
    model = zoo.build("llava", "sdpa")
    compiled_by_itself(model, "layers")
    ids = torch.arange(20, 28)[None]
    expected = oracle.plain_logits(
        model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    )
    with METHOD(model), torch.no_grad():
        torch.testing.assert_close(model(input_ids=ids).logits[:, -1:], expected[:, -1:])


def test_what_is_kept_from_the_compiler_is_not_compiled():
    model = zoo.build("llava", "sdpa")
    inputs = zoo.inputs("llava", model)
    for part in (model.get_decoder(), model.get_encoder(modality="image")):
        part.forward = torch.compiler.disable(part.forward)
    with AutoPrune(Budget.ratio(0.5))(model) as trace, torch.no_grad():
        model(**inputs)
    assert trace.samples[0].tokens_per_layer[-1] < 16


@pytest.mark.parametrize("scores", [[-1.0] * 16, [float("inf")] * 16, [float("nan")] * 16])
def test_vision_scores_that_are_no_shares(scores):
    with pytest.raises(ValueError, match="finite and 0 or more"):
        AutoPrune(Budget.ratio(0.5))(model_of("llava", "sdpa"), vision_scores=scores)


def test_vision_scores_of_another_number_of_tokens():
    model = model_of("llava", "sdpa")
    inputs = zoo.inputs("llava", model, "padded3", only=2)
    method = AutoPrune(Budget.ratio(0.5))
    wrong = pytest.raises(ValueError, match="16 entries but the prompts hold 32")
    with wrong, method(model, vision_scores=torch.ones(16)), torch.no_grad():
        model(**inputs)
