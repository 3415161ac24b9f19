"""Static caches with a length of their own in every layer, judged by the oracle."""

from __future__ import annotations

import functools

import pytest
import torch
import transformers
from torch._dynamo.utils import counters

import autoprune
from autoprune import AutoPrune, Budget
from autoprune.engine.cache.pruned import CacheMemory
from autoprune.errors import UnsupportedError
from tests import oracle, zoo

STEPS = 5
# Slopes that the mutual information of the zoo's prompts changes.
SPREAD = {"k0": 3.0, "gamma": 1.5}
METHODS = {
    "autoprune": AutoPrune(Budget.ratio(0.5), **SPREAD),
    "pre_llm": AutoPrune(Budget.ratio(0.4), first_cut="pre_llm", **SPREAD),
    "recycling": AutoPrune(Budget.ratio(0.5), merger="dpc_knn", **SPREAD),
    "fastv": autoprune.create("fastv", budget=Budget.ratio(0.5)),
}
model_of = functools.cache(zoo.build)
close = functools.partial(torch.testing.assert_close, atol=2e-4, rtol=0)


def size_of(model, inputs):
    """Visual and other tokens of each prompt."""
    visual = zoo.visual_mask(model, inputs["input_ids"]).sum(dim=1)
    return visual.tolist(), (inputs["attention_mask"].sum(dim=1) - visual).tolist()


def cache_for(handle, model, inputs, new=STEPS + 1):
    visual, text = size_of(model, inputs)
    return handle.static_cache([n for n in visual if n], max(text), new)


def columns_of(trace, inputs):
    return oracle.columns_from_trace(trace.samples, inputs["attention_mask"], zoo.LAYERS)


def new_tokens(*shape):
    return torch.randint(10, 100, shape, generator=torch.Generator().manual_seed(shape[-1]))


def held(cache):
    """Bytes of all buffers for keys and values."""
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


@pytest.mark.parametrize(
    ("implementation", "batch"),
    [
        ("sdpa", "single"),
        ("sdpa", "padded3"),
        ("sdpa", "padded3_text"),
        ("eager", "padded3_text"),
    ],
)
@pytest.mark.parametrize("method", ["autoprune", "pre_llm", "fastv"])
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "internvl"])
def test_generate_gives_the_logits_of_the_oracle_and_of_a_growing_cache(
    name, method, implementation, batch
):
    model, method = model_of(name, implementation), METHODS[method]
    inputs = zoo.inputs(name, model, batch)
    pruning = method(model)
    cache = cache_for(pruning, model, inputs)
    assert isinstance(cache, transformers.StaticCache)
    with pruning as trace:
        actual, tokens = oracle.generate_logits(model, inputs, STEPS, past_key_values=cache)
        columns = columns_of(trace, inputs)
        growing, same = oracle.generate_logits(model, inputs, STEPS)
    assert torch.equal(tokens, same)
    close(actual, growing)
    close(actual, oracle.oracle_logits(model, inputs, columns, tokens[:, :STEPS]))


@pytest.mark.parametrize("batch", ["single", "padded3"])
@pytest.mark.parametrize(
    "method",
    [AutoPrune(Budget.ratio(0.5), positions="compacted"), METHODS["pre_llm"]],
    ids=["compacted", "pre_llm"],
)
def test_plain_forwards_give_the_logits_of_the_oracle(method, batch):
    model = model_of("llava")
    inputs = zoo.inputs("llava", model, batch)
    tokens = new_tokens(len(inputs["input_ids"]), STEPS)
    with (pruning := method(model)) as trace:
        cache = cache_for(pruning, model, inputs)
        actual = oracle.manual_logits(model, inputs, tokens, cache)
    expected = oracle.oracle_logits(
        model, inputs, columns_of(trace, inputs), tokens, method.positions
    )
    close(actual, expected)


def test_merged_tokens_have_room():
    model = model_of("llava")
    inputs = zoo.inputs("llava", model, "padded3")
    with (pruning := METHODS["recycling"](model)):
        cache = cache_for(pruning, model, inputs)
        actual, tokens = oracle.generate_logits(model, inputs, STEPS, past_key_values=cache)
        growing, same = oracle.generate_logits(model, inputs, STEPS)
    assert torch.equal(tokens, same)
    close(actual, growing)


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
@pytest.mark.parametrize("method", METHODS)
def test_the_buffers_hold_what_the_trace_says_and_little_more(name, method):
    model, method = model_of(name), METHODS[method]
    inputs = zoo.inputs(name, model)
    (visual,), (text,) = size_of(model, inputs)
    with (pruning := method(model)) as trace:
        cache = pruning.static_cache(visual, text, max_new_tokens=1)
        with torch.no_grad():
            model(**inputs, past_key_values=cache)
    (sample,) = trace.samples
    of_token = sample.kv_bytes_full // (zoo.LAYERS * (visual + text))
    new = zoo.LAYERS * of_token
    capacity = method.capacity(zoo.LAYERS, visual, text, pruning.shape.cost)
    allowed = of_token * sum(n + text for n in capacity)
    assert sample.kv_bytes + new <= held(cache) == allowed + new
    assert held(cache) < 0.9 * sample.kv_bytes_full
    if method.name == "fastv":
        assert held(cache) == sample.kv_bytes + new


@pytest.mark.parametrize("budget", [Budget.flops(0.2), Budget.kv_bytes(500_000)], ids=str)
@pytest.mark.parametrize("name", ["autoprune", "fastv"])
def test_shorter_questions_fit_where_the_budget_also_pays_for_the_text(name, budget):
    pruning = autoprune.create(name, budget=budget)(model_of("llava"))
    visual, text, cost = 576, 64, pruning.shape.cost
    cache = pruning.static_cache(visual, text, max_new_tokens=10)
    room = [layer.max_cache_len - 10 for layer in cache.layers]
    for words in range(text + 1):
        counts = pruning.method.capacity(zoo.LAYERS, visual, words, cost)
        assert all(n + words <= most for n, most in zip(counts, room, strict=True))
    assert sum(room) <= 1.15 * sum(n + text for n in counts)


def assert_like_the_oracle(model, prompts, runs, trace, positions="original"):
    """Logits and tokens of several generations, whose prompts follow each other in the trace."""
    samples = iter(trace.samples)
    for prompt, (actual, tokens) in zip(prompts, runs, strict=True):
        own = [next(samples) for _ in prompt["input_ids"]]
        columns = oracle.columns_from_trace(own, prompt["attention_mask"], zoo.LAYERS)
        close(actual, oracle.oracle_logits(model, prompt, columns, tokens[:, :-1], positions))


def counted_compilation():
    """How generate is to compile, even on a CPU."""
    config = transformers.CompileConfig(
        backend="eager", fullgraph=True, dynamic=False, mode="default"
    )
    config._compile_all_devices = True
    return config


def differ(values):
    return len(set(map(str, values))) > 1


# To compile takes seconds: every family, way to cut and shape of batch is there, not every mixture.
@pytest.mark.parametrize(
    ("name", "method", "batch"),
    [
        ("llava", METHODS["autoprune"], "single"),
        ("llava", METHODS["pre_llm"], "padded3"),
        ("llava", AutoPrune(Budget.ratio(0.5), positions="compacted", **SPREAD), "padded3"),
        ("qwen2_5_vl", METHODS["autoprune"], "padded3"),
    ],
    ids=["llava-single", "llava-pre_llm-padded3", "llava-compacted-padded3", "qwen2_5_vl-padded3"],
)
def test_one_graph_serves_all_prompts_of_a_size(name, method, batch):
    torch._dynamo.reset()
    counters.clear()
    model = zoo.build(name)
    prompts = [zoo.inputs(name, model, batch, seed=seed) for seed in range(5)]
    rows = len(prompts[0]["input_ids"])
    with (pruning := method(model)) as trace:
        cache = cache_for(pruning, model, prompts[0])
        runs = []
        for prompt in prompts:
            cache.reset()
            options = {"past_key_values": cache, "compile_config": counted_compilation()}
            runs.append(oracle.generate_logits(model, prompt, STEPS, **options))
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]
    batches = [trace.samples[start : start + rows] for start in range(0, 5 * rows, rows)]
    assert differ([sample.kept[-1].tolist() for sample in batch] for batch in batches)
    assert differ([sample.tokens_per_layer for sample in batch] for batch in batches)
    assert_like_the_oracle(model, prompts, runs, trace, method.positions)


def test_one_graph_serves_prompts_of_several_sizes():
    torch._dynamo.reset()
    counters.clear()
    model, steps = zoo.build("llava"), 3
    prompts = [zoo.inputs("llava", model, "padded3", only=row) for row in range(3)]
    visual, text = zip(*(size_of(model, prompt) for prompt in prompts), strict=True)
    with (pruning := AutoPrune(Budget.ratio(0.5), first_cut="pre_llm")(model)) as trace:
        cache = pruning.static_cache(
            [n for (n,) in visual], max(n for (n,) in text), max_new_tokens=steps + 1
        )
        runs = []
        for prompt in prompts:
            cache.reset()
            options = {"past_key_values": cache, "compile_config": counted_compilation()}
            runs.append(oracle.generate_logits(model, prompt, steps, **options))
    assert_like_the_oracle(model, prompts, runs, trace)
    assert counters["stats"]["unique_graphs"] == 1


def test_one_graph_serves_a_loop_of_ones_own():
    torch._dynamo.reset()
    counters.clear()
    model, tokens = zoo.build("llava"), new_tokens(1, STEPS)
    prompts = [zoo.inputs("llava", model, "padded3", only=row) for row in range(3)]
    visual, text = zip(*(size_of(model, prompt) for prompt in prompts), strict=True)
    step = torch.compile(model.forward, backend="eager", fullgraph=True, dynamic=False)
    runs = []
    with (pruning := AutoPrune(Budget.ratio(0.5))(model)) as trace:
        cache = pruning.static_cache([n for (n,) in visual], max(n for (n,) in text), STEPS)
        for prompt in prompts:
            cache.reset()
            with torch.no_grad():
                rows = [model(**prompt, past_key_values=cache).logits[:, -1]]
                for place in range(STEPS):
                    token = tokens[:, place : place + 1].clone()
                    rows.append(step(input_ids=token, past_key_values=cache).logits[:, -1])
            runs.append((torch.stack(rows, dim=1), torch.cat([tokens, tokens[:, :1]], dim=1)))
    assert counters["stats"]["unique_graphs"] == 1
    assert_like_the_oracle(model, prompts, runs, trace)


def test_a_step_may_be_compiled_before_the_first_prompt():
    """As a warm-up does: its layers are shorter than the model's one mask."""
    torch._dynamo.reset()
    model, tokens = zoo.build("llava"), new_tokens(1, STEPS)
    prompt = zoo.inputs("llava", model, "padded3", only=2)
    (most,), (text,) = size_of(model, prompt)
    step = torch.compile(model.forward, backend="eager", fullgraph=True, dynamic=False)
    with (pruning := AutoPrune(Budget.ratio(0.5))(model)) as trace, torch.no_grad():
        cache = pruning.static_cache(most, text, STEPS)
        step(input_ids=tokens[:, :1], past_key_values=cache)
        cache.reset()
        rows = [model(**prompt, past_key_values=cache).logits[:, -1]]
        for place in range(STEPS):
            token = tokens[:, place : place + 1].clone()
            rows.append(step(input_ids=token, past_key_values=cache).logits[:, -1])
    runs = [(torch.stack(rows, dim=1), torch.cat([tokens, tokens[:, :1]], dim=1))]
    assert_like_the_oracle(model, [prompt], runs, trace)


def test_a_prompt_that_is_not_cut_fits_a_cache_made_for_larger_ones():
    model = model_of("llava")
    large, small = (zoo.inputs("llava", model, "padded3", only=row) for row in (2, 1))
    ((most,), text), ((least,), _) = size_of(model, large), size_of(model, small)
    assert least < most
    with (pruning := AutoPrune(budget=least)(model)) as trace:
        cache = pruning.static_cache([least, most], max(text), max_new_tokens=STEPS + 1)
        lengths = [layer.max_cache_len for layer in cache.layers]
        assert lengths[-1] < lengths[0]
        runs = []
        for inputs in (small, large):
            cache.reset()
            runs.append(oracle.generate_logits(model, inputs, STEPS, past_key_values=cache))
    assert_like_the_oracle(model, (small, large), runs, trace)
    assert trace.samples[0].tokens_per_layer == [least] * zoo.LAYERS


@pytest.mark.parametrize("compiled", [False, True])
def test_a_text_only_prompt_runs_on_it_after_a_reset(compiled):
    torch._dynamo.reset()
    model = zoo.build("llava")
    inputs = zoo.inputs("llava", model, "padded3")
    text = {"input_ids": new_tokens(3, 9), "attention_mask": torch.ones(3, 9, dtype=torch.long)}
    plain, _ = oracle.generate_logits(model, text, STEPS)
    options = {"compile_config": counted_compilation()} if compiled else {}
    with (pruning := METHODS["pre_llm"](model)):
        cache = cache_for(pruning, model, inputs)
        for prompt in (inputs, text):
            actual, _ = oracle.generate_logits(
                model, prompt, STEPS, past_key_values=cache, **options
            )
            cache.reset()
    close(actual, plain)


@pytest.mark.parametrize("positions", ["original", "compacted"])
def test_what_compiled_decoding_reads_stays_where_it_is(positions):
    model = model_of("llava")
    prompts = [zoo.inputs("llava", model, "padded3", seed=seed) for seed in range(2)]
    with (pruning := AutoPrune(Budget.ratio(0.4), first_cut="pre_llm", positions=positions)(model)):
        cache, places = cache_for(pruning, model, prompts[0]), []
        for prompt in prompts:
            cache.reset()
            model.generate(**prompt, max_new_tokens=2, past_key_values=cache)
            tensors = [
                value
                for holder in (*cache.layers, CacheMemory.of(cache).slots)
                for value in vars(holder).values()
                if isinstance(value, torch.Tensor)
            ]
            places.append([tensor.data_ptr() for tensor in tensors])
    # Keys, values and length of each layer; what new tokens see, and three lengths of the prompt.
    assert len(places[0]) == zoo.LAYERS * 3 + 4
    assert places[0] == places[1]


def test_a_second_turn_runs_on_it():
    model = model_of("llava")
    inputs = zoo.inputs("llava", model, "padded3")
    turns = [new_tokens(3, size) for size in (4, 1, 2)]
    with (pruning := METHODS["autoprune"](model)) as trace:
        conversation = oracle.Conversation(model, inputs, cache_for(pruning, model, inputs, 8))
        actual = [conversation.feed(turn) for turn in turns]
    expected = oracle.oracle_logits(
        model, inputs, columns_of(trace, inputs), torch.cat(turns, dim=1)
    )
    close(torch.cat(actual, dim=1), expected[:, 1:])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_visual": -1}, "visual tokens"),
        ({"num_text": -1}, "num_text="),
    ],
)
def test_a_prompt_that_does_not_fit_is_refused_before_it_runs(change, message):
    model = model_of("llava")
    inputs = zoo.inputs("llava", model)
    (visual,), (text,) = size_of(model, inputs)
    sizes = {"num_visual": visual, "num_text": text, "max_new_tokens": STEPS + 1}
    sizes |= {name: sizes[name] + by for name, by in change.items()}
    with (pruning := METHODS["autoprune"](model)) as trace:
        cache = pruning.static_cache(**sizes)
        with pytest.raises(ValueError, match=message):
            model.generate(**inputs, max_new_tokens=2, past_key_values=cache)
        assert not trace.samples
        assert not any(layer.is_initialized for layer in cache.layers)
        shorter = inputs | {name: inputs[name][:, 1:] for name in ("input_ids", "attention_mask")}
        if "num_text" in change:
            model.generate(**shorter, max_new_tokens=2, past_key_values=cache)


def test_more_new_tokens_than_it_was_made_for_are_refused():
    model = model_of("llava")
    inputs = zoo.inputs("llava", model)
    method = METHODS["autoprune"]
    with method(model) as trace:
        cache = cache_for(method(model), model, inputs, new=4)
        with pytest.raises(ValueError, match=r"max_new_tokens=4, and 5 are"):
            model.generate(**inputs, max_new_tokens=5, past_key_values=cache)
        assert not trace.samples
        options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
        short = model.generate(**inputs, **options, past_key_values=cache)
        assert torch.equal(short, model.generate(**inputs, **options))


@pytest.mark.parametrize("batch", ["single", "padded3"])
def test_beams_run_on_it(batch):
    if batch == "padded3" and not zoo.SINCE_5_19:
        pytest.skip("this transformers mixes up the pictures of a prompt that holds two")
    model = model_of("llava")
    inputs = zoo.inputs("llava", model, batch)
    options = {"max_new_tokens": STEPS, "num_beams": 3, "do_sample": False, "eos_token_id": None}
    method = METHODS["autoprune"]
    with method(model):
        growing = model.generate(**inputs, **options)
        cache = cache_for(method(model), model, inputs)
        assert torch.equal(model.generate(**inputs, **options, past_key_values=cache), growing)


def test_another_batch_size_is_refused():
    model = model_of("llava")
    inputs = zoo.inputs("llava", model, "padded3")
    with (pruning := METHODS["autoprune"](model)):
        cache = cache_for(pruning, model, inputs)
        model.generate(**inputs, max_new_tokens=2, past_key_values=cache)
        cache.reset()
        alone = zoo.inputs("llava", model, "padded3", only=0)
        with pytest.raises(ValueError, match="batch of 3"):
            model.generate(**alone, max_new_tokens=2, past_key_values=cache)


def test_the_cache_of_another_method_is_refused():
    model = model_of("llava")
    inputs = zoo.inputs("llava", model)
    cache = cache_for(METHODS["fastv"](model), model, inputs)
    with METHODS["autoprune"](model), pytest.raises(ValueError, match="was made for FastV"):
        model.generate(**inputs, max_new_tokens=2, past_key_values=cache)


def test_it_is_of_no_use_without_pruning():
    model = model_of("llava")
    inputs = zoo.inputs("llava", model)
    cache = cache_for(METHODS["pre_llm"](model), model, inputs)
    with pytest.raises(ValueError, match="attached"):
        model.generate(**inputs, max_new_tokens=2, past_key_values=cache)


@pytest.mark.parametrize("name", ["gemma3", "llava_sliding"])
def test_sliding_layers_are_refused(name):
    with pytest.raises(UnsupportedError, match="sliding"):
        METHODS["fastv"](model_of(name)).static_cache(16, 10, 4)


@pytest.mark.parametrize("implementation", ["flex_attention"])
def test_other_attention_is_refused(implementation):
    model = model_of("llava", implementation)
    with pytest.raises(UnsupportedError, match="sdpa"):
        METHODS["fastv"](model).static_cache(16, 10, 4)


@pytest.mark.parametrize(
    "sizes", [(0, 4, 4), ([], 4, 4), (16, -1, 4), (16, 4, 0), (16.5, 4, 4), (16, 4, None)]
)
def test_sizes_that_cannot_be_are_refused(sizes):
    with pytest.raises(ValueError, match="must be a whole number"):
        METHODS["fastv"](model_of("llava")).static_cache(*sizes)
