"""Ragged batches: what the layers are given, and that no padding is computed where it is worth it."""

from __future__ import annotations

import functools
from contextlib import contextmanager

import pytest
import torch
from transformers import StaticCache

from autoprune import AutoPrune, Budget
from autoprune.engine.attention import arguments
from autoprune.engine.tokens.packing import WORTH_PACKING, Packing
from autoprune.errors import UnsupportedError
from tests import oracle, zoo, zoo_decoders
from tests.scattered import DEEP, PRE_LLM, Scattered

model_of = functools.cache(zoo.build)


@contextmanager
def shapes_of_layers(model):
    """Shapes of the hidden states that each decoder layer's MLP computes on."""
    shapes = []
    hooks = [
        layer.mlp.register_forward_hook(lambda _, args, __: shapes.append(tuple(args[0].shape[:2])))
        for layer in model.get_decoder().layers
    ]
    yield shapes
    for hook in hooks:
        hook.remove()


def ragged_forward(model, name="llava", schedules=DEEP, **options):
    inputs = zoo.inputs(name, model, "padded3")
    with Scattered(schedules)(model) as trace, shapes_of_layers(model) as shapes, torch.no_grad():
        out = model(**inputs, **options)
    lengths = [
        [sample.tokens_per_layer[layer] + sample.num_text for sample in trace.samples]
        for layer in range(zoo.LAYERS)
    ]
    return inputs, out, shapes, lengths


def test_packing_and_unpacking_are_inverse():
    real = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1], [0, 1, 1, 1]]).bool()
    packing = Packing.of([2, 4, 3], 4, real.device)
    padded = torch.arange(24.0).view(3, 4, 2)
    row = packing.pack(padded)
    assert row.shape == (1, 9, 2)
    assert torch.equal(row[0], padded[real])
    assert torch.equal(packing.unpack(row)[real], padded[real])
    states = torch.arange(48.0).view(2, 3, 4, 2)
    assert torch.equal(packing.pack(states, dim=1)[:, 0], states[:, real])
    keys = row.view(1, 9, 1, 2).transpose(1, 2)
    assert torch.equal(packing.unpack_heads(keys)[:, 0][real], padded[real])


@pytest.mark.parametrize("schedules", [DEEP, PRE_LLM], ids=["deep", "pre_llm"])
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "qwen3_vl", "internvl"])
def test_layers_compute_no_padding_where_it_would_be_much(name, schedules):
    _, out, shapes, lengths = ragged_forward(model_of(name), name, schedules)
    packed = 0
    for layer, (shape, own) in enumerate(zip(shapes, lengths, strict=True)):
        cut = any(cut <= layer for shares in schedules for cut in shares)
        if cut and len(own) * max(own) / sum(own) - 1 >= WORTH_PACKING:
            assert shape == (1, sum(own))
            packed += 1
        elif cut:
            assert shape == (len(own), max(own))
    assert packed
    for layer, own in zip(out.past_key_values.layers, lengths, strict=True):
        assert layer.keys.shape[0] == len(own)
        assert layer.keys.shape[2] == layer.values.shape[2] == max(own)


def test_prompts_that_lost_the_same_number_stay_a_batch():
    shares = ({1: 0.5},)
    model = model_of("llava")
    inputs = zoo.inputs("llava", model, "single")
    inputs = {name: value.repeat_interleave(3, dim=0) for name, value in inputs.items()}
    with Scattered(shares)(model), shapes_of_layers(model) as shapes, torch.no_grad():
        model(**inputs)
    assert {shape[0] for shape in shapes} == {3}


@pytest.mark.parametrize("name", ["gemma3", "llava"])
def test_where_keys_could_not_be_put_back_the_batch_is_padded(name):
    model = model_of(name)
    cache = {}
    if name == "llava":
        cache = {
            "past_key_values": StaticCache(config=model.get_decoder().config, max_cache_len=128)
        }
    _, _, shapes, _ = ragged_forward(model, name, **cache)
    assert {shape[0] for shape in shapes} == {3}


def test_hidden_states_and_logits_come_back_in_their_columns():
    model = model_of("llava")
    inputs = zoo.inputs("llava", model, "padded3")
    method = Scattered(DEEP)
    with method(model) as trace, torch.no_grad():
        out = model(**inputs, output_hidden_states=True, use_cache=False)
    kept = oracle.columns_from_trace(trace.samples, inputs["attention_mask"], zoo.LAYERS)
    with torch.no_grad(), oracle.hiding(model, kept):
        expected = model(**inputs, output_hidden_states=True, use_cache=False)
    real = inputs["attention_mask"].bool()
    for index, states in enumerate(out.hidden_states):
        there = kept[max(index - 1, 0)] & real
        torch.testing.assert_close(
            states[there], expected.hidden_states[index][there], atol=2e-4, rtol=0
        )
    there = kept[-1] & real
    torch.testing.assert_close(out.logits[there], expected.logits[there], atol=2e-4, rtol=0)


@contextmanager
def positions_of_layers(model):
    """The position ids that each decoder layer is given."""
    given = []
    hooks = [
        layer.register_forward_pre_hook(
            lambda _, args, kwargs: given.append(kwargs["position_ids"]), with_kwargs=True
        )
        for layer in model.get_decoder().layers
    ]
    yield given
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize("shared", [True, False], ids=["shared", "own"])
@pytest.mark.parametrize("batch", ["single", "padded3"])
def test_layers_are_given_the_positions_of_the_tokens_they_have(batch, shared, monkeypatch):
    """Where anything reads them."""
    monkeypatch.setattr(arguments, "WITHOUT_IDS", ())
    model = model_of("llava")
    inputs = zoo.inputs("llava", model, batch)
    mask = inputs["attention_mask"].bool()
    ids = torch.arange(mask.shape[1]).expand(mask.shape)
    if not shared:
        ids = inputs["position_ids"] = (mask.cumsum(dim=1) - 1).clamp(min=0)
    with torch.no_grad(), Scattered(DEEP)(model) as trace, positions_of_layers(model) as given:
        model(**inputs)
    kept = oracle.columns_from_trace(trace.samples, mask, zoo.LAYERS)
    for seen, present in zip(given, kept, strict=True):
        present, width = present & mask, seen.shape[-1]
        if width == mask.shape[1]:
            assert torch.equal(seen.expand_as(ids), ids)
        elif len(seen) == 1:
            # One prompt's after the other's.
            assert torch.equal(seen[0], ids[present])
        else:
            left = width - present.sum(dim=1, keepdim=True)
            assert torch.equal(seen[torch.arange(width) >= left], ids[present])
    assert len({seen.shape for seen in given}) > 1


def test_who_hooks_into_a_layer_finds_the_batch():
    """As PEFT does where the prompts of a batch have adapters of their own."""
    model, batches = zoo.build("llava"), []
    inputs, expected, *_ = ragged_forward(model)
    projection = model.get_decoder().layers[-1].self_attn.q_proj
    hook = projection.register_forward_pre_hook(lambda _, args: batches.append(len(args[0])))
    with Scattered(DEEP)(model), torch.no_grad():
        out = model(**inputs)
    hook.remove()
    assert batches == [3]
    torch.testing.assert_close(out.logits, expected.logits, atol=1e-4, rtol=0)
    assert ragged_forward(model)[2][-1][0] == 1


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_what_is_not_finite_stays_within_its_prompt(attention):
    model = zoo.build("llava", attention)
    inputs = zoo.inputs("llava", model, "padded3_text")
    method = Scattered(DEEP)
    with method(model), torch.no_grad():
        expected = model(**inputs).logits[:, -1]
        inputs["pixel_values"][0] = float("nan")
        out = model(**inputs)
    assert out.logits[0, -1].isnan().all()
    torch.testing.assert_close(out.logits[1:, -1], expected[1:], atol=1e-4, rtol=0)
    for layer in out.past_key_values.layers:
        assert layer.keys[1:].isfinite().all() and layer.values[1:].isfinite().all()


def test_autoprune_goes_on_with_the_other_prompts():
    model = zoo.build("llava")
    inputs = zoo.inputs("llava", model, "padded3")
    method = AutoPrune(Budget.ratio(0.5))
    with method(model) as trace, torch.no_grad():
        expected = model(**inputs).logits[1:, -1]
        inputs["pixel_values"][0] = float("nan")
        actual = model(**inputs).logits[1:, -1]
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=0)
    assert trace.samples[3].mutual_information == 0
    assert sum(trace.samples[3].tokens_per_layer) == sum(trace.samples[0].tokens_per_layer)


def test_a_row_of_padding_alone_runs_along():
    model = zoo.build("llava")
    inputs = zoo.inputs("llava", model, "padded3_text")
    alone = zoo.inputs("llava", model, "padded3_text")
    inputs["attention_mask"][1] = 0
    with AutoPrune(Budget.ratio(0.5))(model), torch.no_grad():
        expected, actual = (model(**given).logits[[0, 2], -1] for given in (alone, inputs))
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("method", [Scattered(DEEP), Scattered(PRE_LLM)], ids=["deep", "pre_llm"])
@pytest.mark.parametrize("kind", zoo_decoders.DECODERS)
def test_caches_that_hold_something_else_than_what_attention_sees(kind, method):
    """Latents that keys are made of, or values of which attention takes one half and then the other."""
    model = zoo_decoders.build(kind)
    inputs = zoo.inputs("llava", model, "padded3")
    with shapes_of_layers(model) as shapes, torch.no_grad():
        comparison = oracle.compare(model, inputs, method)
    assert (1, 3) not in shapes and any(shape[0] == 1 for shape in shapes)
    assert comparison.worst < 3e-4
    assert max(comparison.effect) > (0.2 if kind == "minicpm3" else 1.0)


@pytest.mark.parametrize(
    ("family", "kind"), [("internvl", "deepseek_v3"), ("mistral3", "mistral4")]
)
def test_latent_attention_in_the_families_that_come_with_it(family, kind):
    model = zoo_decoders.build(kind, family=family)
    inputs = zoo.inputs(family, model, "padded3")
    with torch.no_grad():
        comparison = oracle.compare(model, inputs, Scattered(DEEP))
    assert comparison.worst < 3e-4
    assert max(comparison.effect) > 1.0


def test_attention_that_is_computed_past_the_interface_is_refused_in_a_ragged_batch():
    model = zoo.build("llava")
    layer = model.get_decoder().layers[3].self_attn

    def attend(hidden_states, past_key_values, **_):
        shape = (*hidden_states.shape[:-1], -1, zoo.HEAD_DIM)
        projections = layer.q_proj, layer.k_proj, layer.v_proj
        query, key, value = (p(hidden_states).view(shape).transpose(1, 2) for p in projections)
        key, value = past_key_values.update(key, value, 3)
        scaled = torch.nn.functional.scaled_dot_product_attention
        out = scaled(query, key, value, is_causal=True, enable_gqa=True)
        return layer.o_proj(out.transpose(1, 2).flatten(2)), None

    layer.forward = lambda past_key_values=None, cache=None, **kwargs: attend(
        past_key_values=past_key_values or cache, **kwargs
    )
    with Scattered(DEEP)(model), torch.no_grad():
        model(**zoo.inputs("llava", model))
        with pytest.raises(
            UnsupportedError, match="does not call transformers' attention interface"
        ):
            model(**zoo.inputs("llava", model, "padded3"))


def test_ragged_batches_run_in_half_precision():
    """Masks of the engine's own are added to scores in every type of numbers."""
    model = zoo.build("llava", "sdpa").bfloat16()
    inputs = zoo.inputs("llava", model, "padded3")
    del inputs["attention_mask"]
    inputs["pixel_values"] = inputs["pixel_values"].bfloat16()
    with AutoPrune(Budget.ratio(0.5), rank_every=2)(model) as trace, torch.no_grad():
        logits = model(**inputs).logits
    assert logits.isfinite().all()
    for sample in trace.samples:
        assert sum(sample.tokens_per_layer) == round(zoo.LAYERS * sample.num_visual / 2)
