"""Smaller numbers, weights on disk, adapters, pipelines: pruning stays exact where the model is."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
import transformers

from autoprune import AutoPrune, Budget, tiny
from tests import oracle, zoo
from tests.scattered import DEEP, Scattered

TOKENS, STEPS = 6, 3
METHODS = {"autoprune": AutoPrune(budget=TOKENS), "deep": Scattered(DEEP)}
close = functools.partial(torch.testing.assert_close, atol=2e-4, rtol=0)
families = pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
methods = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)


def expected_of(model, inputs, trace, tokens):
    columns = oracle.columns_from_trace(trace.samples, inputs["attention_mask"], zoo.LAYERS)
    return oracle.oracle_logits(model, inputs, columns, tokens)


def assert_generates_like_the_oracle(model, inputs, method, judge=None):
    """Prefill and three decode steps; `judge` is the model the oracle runs, if it is another one."""
    judge = judge or model
    with method(model) as trace:
        actual, tokens = oracle.generate_logits(model, inputs, STEPS)
    expected = expected_of(judge, inputs, trace, tokens[:, :STEPS])
    close(actual, expected)
    assert (expected[:, 0] - oracle.plain_logits(judge, inputs)[:, 0]).abs().max() > 1.0
    assert_budget_is_spent(trace, method)


def assert_budget_is_spent(trace, method):
    if isinstance(method, AutoPrune):
        for sample in trace.samples:
            assert sum(sample.tokens_per_layer) == zoo.LAYERS * min(TOKENS, sample.num_visual)


def rms(difference):
    return difference.float().pow(2).mean().sqrt().item()


def in_dtype(inputs, dtype):
    return {
        key: value.to(dtype) if value.is_floating_point() else value
        for key, value in inputs.items()
    }


@methods
@pytest.mark.parametrize("batch", ["single", "padded3_text"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@families
def test_half_precision_differs_by_its_own_rounding_only(name, dtype, batch, method):
    model = zoo.build(name).to(dtype)
    exact = copy.deepcopy(model).float()
    inputs = in_dtype(zoo.inputs(name, model, batch), dtype)
    with method(model) as trace:
        actual, tokens = oracle.generate_logits(model, inputs, STEPS)
    wide = in_dtype(inputs, torch.float32)
    rounded = expected_of(model, inputs, trace, tokens[:, :STEPS])
    expected = expected_of(exact, wide, trace, tokens[:, :STEPS])
    noise = rms(rounded - expected)
    assert 0 < rms(actual - expected) < 1.5 * noise
    assert noise < 0.5 * rms(expected[:, 0] - oracle.plain_logits(exact, wide)[:, 0])
    assert_budget_is_spent(trace, method)


def quantised(model, bits):
    quantization = pytest.importorskip("torchao.quantization")
    config = {
        8: quantization.Int8WeightOnlyConfig(),
        4: quantization.IntxWeightOnlyConfig(torch.int4, quantization.PerGroup(16)),
    }[bits]
    quantization.quantize_(model.get_decoder(), config)
    return model


@methods
@pytest.mark.parametrize("bits", [8, 4])
@families
def test_integer_weights(name, bits, method):
    model = zoo.build(name)
    inputs = zoo.inputs(name, model, "padded3_text")
    plain = oracle.plain_logits(model, inputs)
    quantised(model, bits)
    assert (oracle.plain_logits(model, inputs) - plain).abs().max() > 1e-2
    assert_generates_like_the_oracle(model, inputs, method)


def test_a_cache_of_8_bit_floats_adds_its_own_rounding_only():
    model = zoo.build("llava")
    try:
        transformers.QuantizedCache("fp8", model.config)
    except ValueError:
        pytest.skip("this transformers has no cache of 8-bit floats")
    inputs, tokens = zoo.inputs("llava", model), torch.tensor([[20, 30, 40]])
    light = [transformers.QuantizedCache("fp8", model.config) for _ in range(2)]
    plain = oracle.plain_logits(model, inputs, tokens)
    noise = rms(oracle.manual_logits(model, inputs, tokens, light[0]) - plain)
    with METHODS["autoprune"](model) as trace:
        actual = oracle.manual_logits(model, inputs, tokens, light[1])
    expected = expected_of(model, inputs, trace, tokens)
    assert 0 < rms(actual - expected) < 1.5 * noise
    assert noise < 0.5 * rms(expected - plain)


@methods
@families
def test_weights_on_disk(name, method, tmp_path):
    pytest.importorskip("accelerate")
    whole = zoo.build(name)
    whole.save_pretrained(tmp_path / "model")
    language = "model.language_model"
    places = {f"{language}.layers.{layer}": "cpu" for layer in range(zoo.LAYERS)}
    places |= {f"{language}.layers.{layer}": "disk" for layer in (1, 3, 4)}
    places |= {f"{language}.{part}": "cpu" for part in ("embed_tokens", "norm", "rotary_emb")}
    places |= {"lm_head": "disk"}
    places |= {f"model.{part}": "disk" for part, _ in whole.model.named_children()}
    del places[language]
    model = transformers.AutoModelForImageTextToText.from_pretrained(
        tmp_path / "model", device_map=places, offload_folder=tmp_path / "offload"
    )
    model.generation_config = whole.generation_config
    assert {p.device.type for p in model.parameters()} == {"cpu", "meta"}
    inputs = zoo.inputs(name, model, "padded3_text")
    assert_generates_like_the_oracle(model, inputs, method, judge=whole)


@methods
@families
def test_lora_adapters(name, method):
    peft = pytest.importorskip("peft")
    model = zoo.build(name)
    inputs = zoo.inputs(name, model, "padded3_text")
    plain = oracle.plain_logits(model, inputs)
    config = peft.LoraConfig(
        r=4, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False
    )
    adapted = peft.get_peft_model(model, config).eval()
    assert (oracle.plain_logits(model, inputs) - plain).abs().max() > 1.0
    assert_generates_like_the_oracle(adapted, inputs, method, judge=adapted.get_base_model())
    with adapted.disable_adapter():
        assert_generates_like_the_oracle(adapted, inputs, method, judge=adapted.get_base_model())


@pytest.fixture(scope="module")
def embedded():
    return tiny.load()


@pytest.mark.parametrize("budget", [Budget.ratio(0.25), Budget.ratio(1.0)])
def test_pipelines_prune_inside_the_context(embedded, budget):
    model, processor = embedded
    pipe = transformers.pipeline("image-text-to-text", model=model, processor=processor)
    asked = [(scene := tiny.draw_scene(seed), tiny.ask(scene, seed)[0].text) for seed in range(3)]
    method = AutoPrune(budget)
    with method(model) as alone:
        expected = [
            tiny.answer(model, processor, scene.image, text, max_new_tokens=8)
            for scene, text in asked
        ]
    chats = [
        [
            {
                "role": "user",
                "content": [
                    {"type": "image", "image": scene.image},
                    {"type": "text", "text": text},
                ],
            }
        ]
        for scene, text in asked
    ]
    options = {"max_new_tokens": 8, "do_sample": False}
    with method(model) as trace:
        replies = [
            pipe(text=chat, return_full_text=False, generate_kwargs=options) for chat in chats
        ]
    assert [reply[0]["generated_text"].strip() for reply in replies] == expected
    assert [s.tokens_per_layer for s in trace.samples] == [
        s.tokens_per_layer for s in alone.samples
    ]
    for sample in trace.samples:
        assert sample.num_visual == 144
        assert sum(sample.tokens_per_layer) == round(16 * 144 * budget.value)
