"""Attention backends other than sdpa and eager, and compiled decoding, judged by the oracle."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F
import transformers
from transformers.generation.continuous_batching import PagedAttentionCache

from autoprune import AutoPrune, AutoPruneReference, Budget
from autoprune.engine.attention import tap
from autoprune.errors import UnsupportedError
from tests import kernels, oracle, zoo
from tests.scattered import DEEP, PRE_LLM, Scattered

METHODS = {
    "autoprune": AutoPrune(budget=Budget.ratio(0.5)),
    "deep": Scattered(DEEP),
    "pre_llm": Scattered(PRE_LLM),
    "peek": AutoPrune(Budget.ratio(0.3), first_cut="peek"),
}
FLASH = ["llava", "qwen2_5_vl", "internvl", "qwen3_vl", "glm4v", "paligemma"]
FLEX = ["llava", "qwen2_5_vl"]
BACKENDS = {"flash": kernels.flash_attention, "flex": kernels.flex_attention}
model_of = functools.cache(zoo.build)
close = functools.partial(torch.testing.assert_close, atol=2e-4, rtol=0)


def columns_of(trace, inputs):
    return oracle.columns_from_trace(trace.samples, inputs["attention_mask"], zoo.LAYERS)


def assert_generates_like_the_oracle(model, inputs, method, **options):
    """Prefill and three decode steps, and that taking most tokens away made a difference."""
    with method(model) as trace:
        actual, tokens = oracle.generate_logits(model, inputs, steps=3, **options)
    expected = oracle.oracle_logits(
        model, inputs, columns_of(trace, inputs), tokens[:, :3], method.positions
    )
    close(actual, expected)
    if any(s.tokens_per_layer[-1] < 0.5 * s.num_visual for s in trace.samples):
        assert (expected[:, 0] - oracle.plain_logits(model, inputs)[:, 0]).abs().max() > 1.0


def assert_second_turn_like_the_oracle(model, inputs, method):
    rows = len(inputs["input_ids"])
    turns = [new_tokens(rows, size) for size in (4, 1, 2)]
    with method(model) as trace:
        conversation = oracle.Conversation(model, inputs)
        actual = [conversation.feed(turn) for turn in turns]
    expected = oracle.oracle_logits(
        model, inputs, columns_of(trace, inputs), torch.cat(turns, dim=1), method.positions
    )
    close(torch.cat(actual, dim=1), expected[:, 1:])


def new_tokens(*shape):
    return torch.randint(10, 100, shape, generator=torch.Generator().manual_seed(shape[-1]))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("batch", ["single", "padded3_text"])
@pytest.mark.parametrize("name", FLASH)
def test_flash_attention_equals_the_oracle(name, batch, method):
    model = model_of(name)
    inputs = zoo.inputs(name, model, batch)
    with kernels.flash_attention(model):
        assert_generates_like_the_oracle(model, inputs, METHODS[method])


@pytest.mark.parametrize("schedules", [DEEP, PRE_LLM], ids=["deep", "pre_llm"])
@pytest.mark.parametrize("batch", ["single", "padded3_text"])
@pytest.mark.parametrize("name", ["llava", "internvl"])
def test_flash_attention_with_compacted_positions(name, batch, schedules):
    model = model_of(name)
    inputs = zoo.inputs(name, model, batch)
    with kernels.flash_attention(model):
        method = Scattered(schedules, positions="compacted")
        assert_generates_like_the_oracle(model, inputs, method)


@pytest.mark.parametrize("batch", ["single", "padded3_text"])
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_flash_attention_in_a_second_turn(name, batch):
    model = model_of(name)
    inputs = zoo.inputs(name, model, batch)
    with kernels.flash_attention(model):
        assert_second_turn_like_the_oracle(model, inputs, METHODS["deep"])


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_flash_attention_with_padding_on_the_right(name):
    model = model_of(name)
    inputs = zoo.inputs(name, model, "padded3_text", padding_side="right")
    with kernels.flash_attention(model):
        with METHODS["deep"](model) as trace, torch.no_grad():
            actual = model(**inputs).logits
        expected = oracle.oracle_forward(model, inputs, columns_of(trace, inputs))
    shown = inputs["attention_mask"].bool() & ~zoo.visual_mask(model, inputs["input_ids"])
    close(actual[shown], expected[shown])


@pytest.mark.parametrize("batch", ["single", "padded3_text"])
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_budget_of_everything_changes_nothing(backend, name, batch):
    model = model_of(name)
    inputs = zoo.inputs(name, model, batch)
    with BACKENDS[backend](model):
        plain, _ = oracle.generate_logits(model, inputs, steps=2)
        with AutoPrune(Budget.ratio(1.0))(model):
            pruned, _ = oracle.generate_logits(model, inputs, steps=2)
    assert torch.equal(pruned, plain)
    # And the stand-in computes what sdpa does.
    close(plain, oracle.generate_logits(model, inputs, steps=2)[0])


def test_the_stand_in_takes_restarting_positions_for_packed_sequences():
    model = model_of("llava")
    inputs = zoo.inputs("llava", model)
    length = inputs["input_ids"].shape[1]
    packed = torch.cat([torch.arange(length - 8), torch.arange(8)])[None]
    with torch.no_grad():
        whole = model(**inputs, position_ids=packed).logits[:, -1]
        with kernels.flash_attention(model):
            torn = model(**inputs, position_ids=packed).logits[:, -1]
    assert (torn - whole).abs().max() > 1.0


@pytest.mark.parametrize("name", ["llava", "internvl"])
def test_gaps_in_the_positions_of_one_prompt_do_not_look_like_packed_sequences(name):
    model = model_of(name)
    inputs = zoo.inputs(name, model)
    with kernels.flash_attention(model) as calls:
        oracle.generate_logits(model, inputs, steps=2)
        plain = list(calls)
        calls.clear()
        with METHODS["pre_llm"](model) as trace:
            oracle.generate_logits(model, inputs, steps=2)
    assert trace.samples[0].tokens_per_layer[-1] < trace.samples[0].num_visual
    assert "dense" in plain and calls == plain


@pytest.mark.parametrize("name", ["gemma3", "llava_sliding"])
def test_flash_attention_with_a_sliding_window_shorter_than_the_prompt_is_refused(name):
    model = model_of(name)
    inputs = zoo.inputs(name, model, "padded3")
    ran = []
    hook = model.get_decoder().layers[0].register_forward_hook(lambda *_: ran.append(1))
    with hook, kernels.flash_attention(model), METHODS["deep"](model) as trace:
        with pytest.raises(UnsupportedError, match="its sliding window"):
            model.generate(**inputs, max_new_tokens=2)
        assert not ran and not trace.samples


@pytest.mark.parametrize("batch", ["single", "padded3_text"])
def test_flash_attention_may_slide_behind_the_prompt(batch):
    model = zoo.build("llava_sliding")
    inputs = zoo.inputs("llava_sliding", model, batch)
    set_window(model, inputs["input_ids"].shape[1])
    with kernels.flash_attention(model):
        assert_generates_like_the_oracle(model, inputs, METHODS["deep"])
        with METHODS["deep"](model):
            conversation = oracle.Conversation(model, inputs)
            with pytest.raises(UnsupportedError, match="several new tokens at once"):
                conversation.feed(new_tokens(len(inputs["input_ids"]), 4))


def set_window(model, window):
    text = model.get_decoder()
    text.config.sliding_window = window
    for layer in text.layers:
        layer.self_attn.sliding_window = window


def test_flash_attention_with_a_static_cache_is_refused():
    model = model_of("llava")
    inputs = zoo.inputs("llava", model, "padded3")
    with kernels.flash_attention(model), METHODS["deep"](model) as trace:
        with pytest.raises(UnsupportedError, match="static cache"):
            model.generate(**inputs, max_new_tokens=2, cache_implementation="static")
        assert not trace.samples


@pytest.mark.parametrize("method", ["autoprune", "pre_llm", "peek"])
@pytest.mark.parametrize("batch", ["single", "padded3_text"])
@pytest.mark.parametrize("name", FLEX)
def test_flex_attention_equals_the_oracle(name, batch, method):
    model = model_of(name)
    inputs = zoo.inputs(name, model, batch)
    with kernels.flex_attention(model):
        assert_generates_like_the_oracle(model, inputs, METHODS[method])


@pytest.mark.parametrize("name", ["gemma3", "llava_sliding", "paligemma"])
def test_flex_attention_keeps_sliding_windows_and_prefixes(name):
    model = model_of(name)
    inputs = zoo.inputs(name, model, "padded3_text")
    with kernels.flex_attention(model):
        assert_generates_like_the_oracle(model, inputs, METHODS["deep"])


def test_flex_attention_with_compacted_positions():
    model = model_of("llava")
    inputs = zoo.inputs("llava", model, "padded3_text")
    with kernels.flex_attention(model):
        method = Scattered(DEEP, positions="compacted")
        assert_generates_like_the_oracle(model, inputs, method)


@pytest.mark.parametrize("batch", ["single", "padded3_text"])
def test_flex_attention_in_a_second_turn(batch):
    model = model_of("llava")
    inputs = zoo.inputs("llava", model, batch)
    with kernels.flex_attention(model):
        assert_second_turn_like_the_oracle(model, inputs, METHODS["deep"])


@pytest.mark.parametrize("batch", ["single", "padded3_text"])
def test_flex_attention_with_a_static_cache(batch):
    model = model_of("llava")
    inputs = zoo.inputs("llava", model, batch)
    rows, length = inputs["input_ids"].shape
    tokens = new_tokens(rows, 3)
    # By hand: transformers' generate cannot combine the two, pruned or not.
    cache = transformers.StaticCache(model.config, max_cache_len=length + 5)
    with kernels.flex_attention(model), METHODS["deep"](model) as trace:
        actual = oracle.manual_logits(model, inputs, tokens, cache)
    close(actual, oracle.oracle_logits(model, inputs, columns_of(trace, inputs), tokens))


# To compile takes seconds: every family, way to cut and shape of batch is there, not every mixture.
@pytest.mark.parametrize(
    ("name", "method", "batch"),
    [
        ("llava", METHODS["autoprune"], "padded3"),
        ("llava", AutoPrune(budget=4, first_cut="pre_llm"), "padded3"),
        ("qwen2_5_vl", METHODS["autoprune"], "single"),
        ("llava", AutoPruneReference(budget=4, recycle=False), "padded3"),
    ],
    ids=["llava-padded3", "llava-pre_llm-padded3", "qwen2_5_vl-single", "llava-compacted-padded3"],
)
def test_compiled_decoding_is_one_graph_for_all_kept_sets(name, method, batch):
    torch._dynamo.reset()
    model, graphs = zoo.build(name), []
    prompts = [zoo.inputs(name, model, batch, seed=seed) for seed in range(3)]
    options = {"cache_implementation": "static", "compile_config": counted_in(graphs)}
    with method(model) as trace:
        runs = [oracle.generate_logits(model, prompt, steps=3, **options) for prompt in prompts]
    assert len(graphs) == 1
    rows = len(prompts[0]["input_ids"])
    assert len({tuple(sample.kept[-1].tolist()) for sample in trace.samples[::rows]}) > 1
    for place, (prompt, (actual, tokens)) in enumerate(zip(prompts, runs, strict=True)):
        own = trace.samples[place * rows : (place + 1) * rows]
        columns = oracle.columns_from_trace(own, prompt["attention_mask"], zoo.LAYERS)
        close(
            actual,
            oracle.oracle_logits(model, prompt, columns, tokens[:, :3], method.positions),
        )


def counted_in(graphs):
    """How generate is to compile: every graph made is put into the list."""

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    config = transformers.CompileConfig(
        backend=backend, fullgraph=True, dynamic=False, mode="default"
    )
    config._compile_all_devices = True
    return config


def test_compiled_decoding_forgets_an_earlier_prompt():
    torch._dynamo.reset()
    model = zoo.build("llava")
    cache = transformers.StaticCache(model.config.get_text_config(), max_cache_len=100)
    options = {
        "past_key_values": cache,
        "compile_config": counted_in([]),
        "max_new_tokens": 4,
        "do_sample": False,
        "output_logits": True,
        "return_dict_in_generate": True,
    }
    inputs, text = zoo.inputs("llava", model, "padded3"), torch.arange(4, 40).view(3, 12)
    expected = torch.stack(model.generate(text, **options).logits)
    with AutoPrune(Budget.ratio(0.4))(model):
        cache.reset()
        model.generate(**inputs, **options)
        cache.reset()
        actual = torch.stack(model.generate(text, **options).logits)
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
@pytest.mark.parametrize("fullgraph", [False, True])
def test_a_prefill_inside_torch_compile_is_refused(name, fullgraph):
    torch._dynamo.reset()
    model = zoo.build(name)
    inputs = zoo.inputs(name, model)
    compiled = torch.compile(model, backend="eager", fullgraph=fullgraph)
    error = Exception if fullgraph else UnsupportedError
    with METHODS["deep"](model) as trace, torch.no_grad():
        with pytest.raises(error, match="compile"):
            compiled(**inputs)
        assert not trace.samples


def test_continuous_batching_is_refused():
    model = model_of("llava")
    inputs = zoo.inputs("llava", model)
    # Its manager and its blocks need a GPU; what it passes to every forward is this.
    cache = object.__new__(PagedAttentionCache)
    with METHODS["deep"](model) as trace, pytest.raises(UnsupportedError, match="continuous"):
        model(**inputs, cache=cache)
    assert not trace.samples


@pytest.fixture
def plans(monkeypatch):
    """Whether cuDNN may plan attention, noted at every call of torch's."""
    before, seen = torch.backends.cuda.cudnn_sdp_enabled(), []
    original = F.scaled_dot_product_attention

    def noted(*args, **kwargs):
        seen.append(torch.backends.cuda.cudnn_sdp_enabled())
        return original(*args, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", noted)
    torch.backends.cuda.enable_cudnn_sdp(True)
    yield seen
    torch.backends.cuda.enable_cudnn_sdp(before)


@pytest.mark.parametrize("batch", ["single", "padded3"])
def test_attention_plans_no_shapes_where_every_prompt_brings_new_ones(plans, batch):
    model = model_of("llava")
    inputs = zoo.inputs("llava", model, batch)
    first_cut = 2
    with Scattered(({first_cut: 0.5},))(model), torch.no_grad():
        cache = model(**inputs, use_cache=True).past_key_values
        assert plans[-zoo.LAYERS :] == [layer < first_cut for layer in range(zoo.LAYERS)]
        mask = torch.cat([inputs["attention_mask"], inputs["attention_mask"][:, -1:]], dim=1)
        model(input_ids=inputs["input_ids"][:, :1], attention_mask=mask, past_key_values=cache)
        assert not any(plans[-zoo.LAYERS :])
        assert torch.backends.cuda.cudnn_sdp_enabled()
        model(input_ids=inputs["input_ids"][:, :1].clone())
        assert all(plans[-zoo.LAYERS :])


def test_plans_are_back_after_all_who_did_without_them(plans):
    def broken():
        with tap.no_plans:
            raise KeyError

    with tap.no_plans:
        with pytest.raises(KeyError):
            broken()
        assert not torch.backends.cuda.cudnn_sdp_enabled()
    assert torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    with tap.no_plans:
        pass
    assert not torch.backends.cuda.cudnn_sdp_enabled()
