"""Prefills whose decoder layers are compiled equal those that run as they are."""

from __future__ import annotations

import functools
import threading

import pytest
import torch
import torch._inductor.config
from torch._dynamo.utils import counters
from torch.utils.flop_counter import FlopCounterMode
from transformers import StaticCache

import autoprune
from autoprune import AutoPrune, Budget, UnsupportedError
from autoprune.engine.attention.tap import traced
from tests import oracle, zoo
from tests.engine.test_attach import everything_in

METHOD = AutoPrune(Budget.ratio(0.5), k0=3.0, gamma=1.5)
STEPS = 2
model_of = functools.cache(zoo.build)
close = functools.partial(torch.testing.assert_close, atol=1e-5, rtol=1e-5)


@pytest.fixture(autouse=True)
def graphs():
    """Counts the graphs that torch makes."""
    counters.clear()
    return lambda: (
        counters["stats"]["unique_graphs"] - 1
    )  # one is the check that the compiler works


def answers(model, inputs):
    """Logits of the prompt and of the steps behind it, and the tokens."""
    return oracle.generate_logits(model, inputs, STEPS)


def kept(trace):
    return [[layer.tolist() for layer in sample.kept] for sample in trace.samples]


@pytest.mark.parametrize(
    ("name", "batch"),
    [
        ("llava", "padded3"),
        ("qwen2_5_vl", "single"),
        ("internvl", "single"),
        ("llava_sliding", "single"),
    ],
)
def test_prompt_and_answer_are_those_of_layers_that_run_as_they_are(name, batch):
    model = model_of(name)
    inputs = zoo.inputs(name, model, batch)
    with METHOD(model) as trace:
        expected, tokens = answers(model, inputs)
    handle = METHOD.attach(model)
    handle.compile_prefill("eager")
    logits, same = answers(model, inputs)
    handle.detach()
    assert torch.equal(same, tokens)
    assert kept(handle.trace) == kept(trace)
    close(logits, expected)


def test_inductor_gives_the_same(graphs, monkeypatch):
    # For a single graph, processes that compile beside this one only take long to start.
    monkeypatch.setattr(torch._inductor.config, "compile_threads", 1)
    model = model_of("llava")
    inputs = zoo.inputs("llava", model)
    with METHOD(model) as trace:
        expected, tokens = answers(model, inputs)
    handle = METHOD.attach(model).compile_prefill()
    logits, same = answers(model, inputs)
    handle.detach()
    assert torch.equal(same, tokens)
    assert kept(handle.trace) == kept(trace)
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-5)
    assert graphs() == 1


def test_one_graph_serves_all_layers_and_all_lengths(graphs):
    model = model_of("llava")
    pruning = METHOD(model).compile_prefill("eager")
    lengths = set()
    for seed in range(3):
        inputs = zoo.inputs("llava", model, seed=seed)
        inputs["input_ids"] = torch.cat([inputs["input_ids"], torch.full((1, seed), 50)], dim=1)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        with pruning as trace, torch.no_grad():
            model(**inputs)
        sample = trace.samples[-1]
        lengths |= {sample.num_text + n for n in sample.tokens_per_layer}
    assert len(lengths) >= 5
    assert graphs() == 1


class Counted:
    """A backend that counts the layers that run compiled."""

    def __init__(self):
        self.runs = 0

    def __call__(self, graph, inputs):
        def run(*args):
            self.runs += 1
            return graph(*args)

        return run


def test_every_layer_of_a_prompt_runs_compiled_and_no_step_of_decoding_does():
    model, backend = model_of("llava"), Counted()
    pruning = METHOD(model).compile_prefill(backend)
    backend.runs = 0
    with pruning:
        answers(model, zoo.inputs("llava", model))
    assert backend.runs == zoo.LAYERS


def test_packed_rows_and_prompts_without_pictures_run_as_they_are():
    model, backend = model_of("llava"), Counted()
    pruning = METHOD(model).compile_prefill(backend)
    backend.runs = 0
    with pruning:
        answers(model, zoo.inputs("llava", model, "padded3"))
        packed = pruning.trace.samples
        runs = backend.runs
        model.generate(torch.tensor([[zoo.BOS, 20, 21]]), max_new_tokens=2)
    assert len(packed) == 3
    assert 0 < runs < zoo.LAYERS
    assert backend.runs == runs


@pytest.mark.parametrize("name", ["pdrop", "visionzip"])
def test_other_methods_see_the_same(name):
    model = model_of("llava")
    inputs = zoo.inputs("llava", model)
    method = autoprune.create(name, budget=Budget.ratio(0.5))
    with method(model) as trace:
        expected, _ = answers(model, inputs)
    with method(model).compile_prefill("eager") as compiled:
        logits, _ = answers(model, inputs)
    assert kept(compiled) == kept(trace)
    close(logits, expected)


def test_recorded_hidden_states_are_the_same(graphs):
    model = model_of("llava")
    inputs = zoo.inputs("llava", model) | {"output_hidden_states": True}
    with torch.no_grad(), METHOD(model):
        expected = model(**inputs).hidden_states
    with torch.no_grad(), METHOD(model).compile_prefill("eager"):
        states = model(**inputs).hidden_states
    assert graphs() == 1
    close(states, expected)


def test_layers_whose_operations_are_counted_run_as_they_are_and_compiled_again_afterwards():
    model, backend = model_of("llava"), Counted()
    inputs = zoo.inputs("llava", model)
    with METHOD(model), FlopCounterMode(display=False) as expected:
        oracle.plain_logits(model, inputs)
    pruning = METHOD(model).compile_prefill(backend)
    backend.runs = 0
    with pruning:
        with FlopCounterMode(display=False) as flops:
            oracle.plain_logits(model, inputs)
        assert backend.runs == 0
        oracle.plain_logits(model, inputs)
    assert flops.get_total_flops() == expected.get_total_flops() > 0
    assert backend.runs == zoo.LAYERS


def test_the_cache_holds_what_the_trace_says():
    model = model_of("llava")
    with METHOD(model).compile_prefill("eager") as trace, torch.no_grad():
        cache = model(**zoo.inputs("llava", model), use_cache=True).past_key_values
    (sample,) = trace.samples
    tensors = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
    assert sum(tensor.untyped_storage().nbytes() for tensor in tensors) == sample.kv_bytes


def test_attaching_again_keeps_the_graph_and_detaching_restores_the_model(graphs):
    model = zoo.build("llava")
    inputs = zoo.inputs("llava", model)
    plain = oracle.plain_logits(model, inputs)
    before = everything_in(model)
    handle = METHOD.attach(model)
    assert handle.compile_prefill("eager") is handle
    for _ in range(2):
        answers(model, inputs)
        handle.detach()
        assert everything_in(model) == before
        handle.attach()
    handle.detach()
    assert graphs() == 1
    assert traced.calls is None
    assert torch.equal(oracle.plain_logits(model, inputs), plain)


def test_other_attention_is_refused():
    with pytest.raises(UnsupportedError, match="needs attn_implementation='sdpa'"):
        METHOD(zoo.build("llava", "eager")).compile_prefill("eager")


def test_layers_that_are_compiled_already_are_refused():
    model = zoo.build("llava")
    model.get_decoder().layers[1].compile(backend="eager")
    with pytest.raises(UnsupportedError, match="compiled by itself"):
        METHOD(model).compile_prefill("eager")


@pytest.mark.parametrize("attached", [True, False])
def test_layers_whose_forward_was_wrapped_are_refused(attached):
    model = zoo.build("llava")
    layer = model.get_decoder().layers[2]
    own = layer.forward
    layer.forward = lambda *args, **kwargs: own(*args, **kwargs)
    pruning = METHOD(model)
    if attached:
        refused = functools.partial(pruning.attach().compile_prefill, "eager")
    else:
        refused = pruning.compile_prefill("eager").attach
    with pytest.raises(UnsupportedError, match="wrapped by something else"):
        refused()
    pruning.detach()


def test_a_compiler_that_fails_is_refused_at_once():
    def broken(graph, inputs):
        raise RuntimeError("no compiler at hand")

    pruning = METHOD(model_of("llava"))
    with pytest.raises(UnsupportedError, match=r"no compiler at hand.*without compile_prefill"):
        pruning.compile_prefill(broken)
    with pytest.raises(ValueError, match="list_backends"):
        pruning.compile_prefill("indcutor")


def test_a_compiler_that_is_switched_off_is_refused():
    off = torch._dynamo.config.patch(disable=True)
    with (
        off,
        pytest.raises(UnsupportedError, match=r"compile (does not work|is switched off)"),
    ):
        METHOD(model_of("llava")).compile_prefill("eager")


def test_layers_that_are_not_one_graph_are_refused():
    model = zoo.build("llava")
    model.get_decoder().layers[0].mlp.register_forward_hook(
        lambda module, args, output: torch._dynamo.graph_break()
    )
    inputs = zoo.inputs("llava", model)
    with (
        METHOD(model).compile_prefill("eager"),
        pytest.raises(UnsupportedError, match="one graph of LlamaDecoderLayer"),
    ):
        oracle.plain_logits(model, inputs)


def test_static_caches_are_refused():
    model = model_of("llava")
    inputs = zoo.inputs("llava", model)
    cache = StaticCache(model.config, max_cache_len=64)
    with (
        METHOD(model).compile_prefill("eager"),
        pytest.raises(UnsupportedError, match="default cache, not StaticCache"),
    ):
        oracle.manual_logits(model, inputs, inputs["input_ids"][:, :0], cache)


def test_another_thread_prunes_while_one_compiles():
    """torch says of every thread that it compiles, as long as one does."""
    model = zoo.build("llava", "sdpa")
    inputs = zoo.inputs("llava", model, "single")
    failed: list[BaseException] = []
    ran: list[int] = []

    def prune() -> None:
        try:
            with torch.no_grad():
                ran.append(model(**inputs).logits.shape[1])
        except BaseException as error:
            failed.append(error)

    def backend(graph, examples):
        if not ran:
            thread = threading.Thread(target=prune)
            thread.start()
            thread.join()
        return graph.forward

    other = AutoPrune(Budget.ratio(0.5)).attach(model)
    try:
        # Another model's compilation is enough.
        torch.compile(torch.nn.Linear(2, 2), backend=backend)(torch.zeros(1, 2))
    finally:
        other.detach()
    assert ran and not failed
