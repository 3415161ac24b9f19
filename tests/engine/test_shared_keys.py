"""Gemma 4 and Llama 4: layers that read the keys of earlier ones, chunks, and temperatures by position."""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import StaticCache

from autoprune import AutoPrune, Budget
from autoprune.engine.cache.argument import as_argument, cache_of
from autoprune.engine.locate import Window, locate
from autoprune.errors import UnsupportedError
from autoprune.methods.fastv import FastV
from autoprune.policy.cost import DecoderCost
from tests import oracle, zoo
from tests.scattered import DEEP, PRE_LLM, Scattered

TOLERANCE = 2e-4
NAMES = ["gemma4", "gemma4_moe", "llama4"]
HALF = AutoPrune(Budget.ratio(0.5))
# Layers 3 to 5 of the tiny Gemma 4 read the keys of layers 1 and 2; cuts before, between and behind these.
BETWEEN = ({2: 0.6, 3: 0.5, 5: 0.2}, {4: 0.3}, {5: 0.0})
model_of = functools.cache(zoo.build)
every_family = pytest.mark.parametrize("name", NAMES)
close = functools.partial(torch.testing.assert_close, atol=TOLERANCE, rtol=0)


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def expected(model, arguments, samples, tokens=None):
    columns = oracle.columns_from_trace(samples, arguments["attention_mask"], zoo.LAYERS)
    return oracle.oracle_logits(model, arguments, columns, tokens)


@every_family
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("schedules", [DEEP, PRE_LLM, BETWEEN], ids=["deep", "pre_llm", "between"])
def test_cuts_before_any_layer_equal_the_oracle(name, attention, schedules):
    model = model_of(name, attention)
    for batch in ("single", "padded3"):
        arguments = zoo.inputs(name, model, batch)
        result = oracle.compare(model, arguments, Scattered(schedules), steps=3)
        assert result.worst < TOLERANCE
    assert max(result.effect) > 1.0


@every_family
def test_a_right_padded_forward_equals_the_oracle(name):
    model = model_of(name, "sdpa")
    arguments = zoo.inputs(name, model, "padded3", padding_side="right")
    with Scattered(DEEP)(model) as trace:
        logits = model(**arguments).logits
    columns = oracle.columns_from_trace(trace.samples, arguments["attention_mask"], zoo.LAYERS)
    whole = oracle.oracle_forward(model, arguments, columns)
    last, rows = arguments["attention_mask"].sum(dim=1) - 1, torch.arange(3)
    close(logits[rows, last], whole[rows, last])


@every_family
def test_chunks_and_windows_go_on_while_tokens_are_generated(name):
    """A chunk of Llama 4 has 16 tokens here, and a window of Gemma 4 has 12."""
    model = model_of(name, "sdpa")
    for batch in ("single", "padded3_text"):
        arguments = zoo.inputs(name, model, batch)
        result = oracle.compare(model, arguments, Scattered(DEEP), steps=20)
        assert result.worst < TOLERANCE


@every_family
def test_windows_and_chunks_that_end_while_tokens_are_generated(name):
    """They hide nothing of the prompt: the third token is the first that does not see all."""
    family, arguments = zoo.CORE[name], zoo.inputs(name, model_of(name, "sdpa"))
    config = family.config()
    size = arguments["input_ids"].shape[1] + 2
    config.text_config.sliding_window = config.text_config.attention_chunk_size = size
    model = zoo.build_family(replace(family, config=lambda: config))
    result = oracle.compare(model, arguments, Scattered(DEEP), steps=6)
    assert result.worst < TOLERANCE


@every_family
def test_rows_that_are_moved_keep_their_prompts_chunks(name):
    model = model_of(name, "sdpa")
    arguments = zoo.inputs(name, model, "padded3")
    order = torch.tensor([2, 0, 0, 1])
    turns = torch.tensor([[7, 8, 9]]).expand(4, -1)
    with Scattered(DEEP)(model) as trace:
        conversation = oracle.Conversation(model, arguments)
        conversation.cache.batch_select_indices(order)
        conversation.mask = conversation.mask[order]
        actual = torch.cat([conversation.feed(turns[:, i : i + 1]) for i in range(3)], dim=1)
    slow = expected(model, arguments, trace.samples, turns[:3])[:, 1:]
    close(actual, slow[order])


# Beams of Llama 4 with pictures fail in transformers itself.
@pytest.mark.parametrize("name", ["gemma4", "gemma4_moe"])
def test_beams_equal_those_of_the_oracle(name):
    model = model_of(name, "sdpa")
    arguments = zoo.inputs(name, model, "padded3_text")
    pruned, slow = oracle.beam_search(model, arguments, HALF, beams=3, tokens=6)
    assert torch.equal(pruned, slow)


@every_family
def test_a_second_turn_of_several_tokens_equals_the_oracle(name):
    model = model_of(name, "sdpa")
    arguments = zoo.inputs(name, model, "padded3_text")
    turn = torch.tensor([[7, 8, 9]]).expand(3, -1)
    with Scattered(BETWEEN)(model) as trace:
        conversation = oracle.Conversation(model, arguments)
        conversation.feed(turn)
        actual = conversation.feed(turn)
    slow = expected(model, arguments, trace.samples, torch.cat([turn, turn], dim=1))
    close(actual, slow[:, -3:])


@every_family
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kept", [1, 2])
def test_a_turn_of_which_a_few_logits_are_wanted_equals_the_oracle(name, attention, kept):
    """As `generate` wants them. Layers that read earlier keys would run for these tokens alone."""
    model = model_of(name, attention)
    arguments = zoo.inputs(name, model, "padded3_text")
    turn = torch.tensor([[7, 8, 9]]).expand(3, -1)
    with Scattered(BETWEEN)(model) as trace:
        conversation = oracle.Conversation(model, arguments)
        mask = torch.cat([arguments["attention_mask"], torch.ones_like(turn)], dim=1)
        cache = as_argument(model, conversation.cache)
        actual = model(input_ids=turn, attention_mask=mask, logits_to_keep=kept, **cache).logits
    slow = expected(model, arguments, trace.samples, turn)
    close(actual, slow[:, -kept:])


@every_family
def test_a_turn_through_generate_equals_the_oracle(name):
    model = model_of(name, "sdpa")
    arguments = zoo.inputs(name, model, "single")
    turn = torch.tensor([[7, 8, 9, 10]])
    with Scattered(BETWEEN)(model) as trace:
        conversation = oracle.Conversation(model, arguments)
        samples = list(trace.samples)
        ids = torch.cat([arguments["input_ids"], turn], dim=1)
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            past_key_values=conversation.cache,
            max_new_tokens=3,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
    new = torch.cat([turn, out.sequences[:, ids.shape[1] :]], dim=1)
    slow = expected(model, arguments, samples, new)
    close(torch.stack(out.logits, dim=1), slow[:, 4:7])


@every_family
def test_a_batch_without_a_cache_equals_the_oracle(name):
    model = model_of(name, "sdpa")
    arguments = zoo.inputs(name, model, "padded3")
    with Scattered(BETWEEN)(model) as trace:
        actual = model(**arguments, use_cache=False).logits[:, -1:]
    close(actual, expected(model, arguments, trace.samples))


@every_family
def test_a_summary_equals_that_of_the_oracle(name):
    model = model_of(name, "sdpa")
    arguments = zoo.inputs(name, model, "padded3")
    method = AutoPrune(Budget.ratio(0.4), merger="summary")
    assert oracle.compare(model, arguments, method, steps=2).worst < TOLERANCE


@every_family
def test_compacted_positions_are_refused(name):
    with pytest.raises(UnsupportedError, match="use positions='original'"):
        AutoPrune(8, positions="compacted")(model_of(name, "sdpa"))


@every_family
def test_a_static_cache_is_refused(name):
    model = model_of(name, "sdpa")
    cache = StaticCache(config=model.config.get_text_config(), max_cache_len=80)
    with pytest.raises(UnsupportedError, match="use the default cache"), HALF(model):
        model(**zoo.inputs(name, model), past_key_values=cache)


class TestSharedKeys:
    """Of Gemma 4 E2B and E4B."""

    @pytest.fixture
    def model(self):
        return model_of("gemma4", "sdpa")

    def test_the_layers_that_read_are_found(self, model):
        located = locate(model)
        assert located.reads == [None, None, None, 1, 2, 1]
        assert located.windows == [Window(12), None] * 3

    def test_what_is_dropped_later_is_gone_from_shared_keys(self, model):
        """The oracle notices if the last layer goes on to see what was dropped before it."""
        arguments = zoo.inputs("gemma4", model)
        with Scattered(({5: 0.0},))(model) as trace:
            actual = model(**arguments).logits[:, -1:]
        whole = expected(model, arguments, trace.samples)
        assert (oracle.plain_logits(model, arguments) - whole).abs().max() > 0.1
        close(actual, whole)

    def test_layers_that_read_have_no_cache_and_cost_none(self, model):
        arguments = zoo.inputs("gemma4", model)
        with Scattered(DEEP)(model) as trace:
            cache = cache_of(model(**arguments, use_cache=True))
        (sample,) = trace.samples
        assert [layer.keys is None for layer in cache.layers[:3]] == [False] * 3
        assert all(layer.keys is None for layer in cache.layers[3:])
        assert sample.kv_bytes < sample.kv_bytes_full
        full = locate(model).cost.kv_bytes([sample.num_visual] * 6, sample.num_text)
        width = sample.num_visual + sample.num_text
        # Keys and values of two heads, in float32: of 16 numbers in sliding layers, of 32 in others.
        assert sample.kv_bytes_full == full == width * 4 * 2 * 2 * (16 + 32 + 16)

    def test_its_flops_are_those_of_the_decoder(self):
        text = locate(zoo.build("gemma4", "eager")).text
        embeds, inputs = torch.randn(1, 20, 64), torch.randn(1, 20, 6, 8)
        with FlopCounterMode(display=False) as counter:
            text(inputs_embeds=embeds, per_layer_inputs=inputs)
        counted = counter.get_flop_counts()
        layers = [counted[f"Gemma4TextModel.layers.{index}"] for index in range(6)]
        cost = DecoderCost.from_config(text.config)
        assert sum(sum(layer.values()) for layer in layers) == cost.prefill_flops([20] * 6)

    def test_the_last_layers_run_on_all_that_is_kept(self, model):
        """`generate` skips all but the last token there, and a method looks at the others, too."""
        arguments = zoo.inputs("gemma4", model)
        seen = []
        layer = locate(model).layers[5]
        hook = layer.register_forward_hook(lambda *call: seen.append(call[2].shape[1]))
        with Scattered(DEEP)(model) as trace:
            model.generate(**arguments, max_new_tokens=1)
        hook.remove()
        assert seen[0] == trace.samples[0].tokens_per_layer[5] + trace.samples[0].num_text

    def test_tokens_that_are_made_later_are_refused(self, model):
        arguments = zoo.inputs("gemma4", model)
        method = AutoPrune(Budget.ratio(0.5), merger="dpc_knn")
        reason = "have none for tokens that a later cut made"
        with pytest.raises(UnsupportedError, match=reason), method(model):
            model(**arguments)

    def test_decoding_outside_of_the_context_is_refused(self, model):
        arguments = zoo.inputs("gemma4", model)
        with Scattered(({5: 0.2},))(model):
            conversation = oracle.Conversation(model, arguments)
        reason = "cache was pruned, and some layers see less of the keys of an earlier layer than"
        with pytest.raises(UnsupportedError, match=reason):
            conversation.feed(torch.tensor([[7]]))

    def test_compiled_layers_are_refused(self, model):
        handle = HALF.attach(model)
        try:
            with pytest.raises(UnsupportedError, match="hand keys and values to each other"):
                handle.compile_prefill("eager")
        finally:
            handle.detach()

    def test_budgets_over_layers_that_are_alike_are_refused(self, model):
        arguments = zoo.inputs("gemma4", model)
        reason = "these 6 are of 4 kinds; give a budget of tokens"
        for budget in (Budget.flops(0.5), Budget.kv_bytes(4000)):
            with pytest.raises(ValueError, match=reason), AutoPrune(budget)(model):
                model(**arguments)
        with pytest.raises(UnsupportedError, match="cut_every='auto' needs layers that are all"):
            AutoPrune(8, cut_every="auto")(model)


class TestLlama4:
    @pytest.fixture
    def model(self):
        return model_of("llama4", "sdpa")

    def test_chunks_are_found(self, model):
        chunk = Window(16, chunked=True)
        assert locate(model).windows == [chunk, chunk, None] * 2

    def test_temperatures_follow_positions(self, model):
        """The tiny model's change every 4 tokens, so a cut would change those of all text behind it."""
        arguments = zoo.inputs("llama4", model)
        with Scattered(({0: 0.2},))(model) as trace:
            actual = model(**arguments).logits[:, -1:]
        close(actual, expected(model, arguments, trace.samples))
        tuned = [layer.self_attn for layer in locate(model).layers]
        for attention in tuned:
            attention.attn_temperature_tuning = False
        flat = expected(model, arguments, trace.samples)
        for attention in tuned:
            attention.attn_temperature_tuning = True
        assert (flat - actual).abs().max() > 0.1

    def test_compiled_layers_are_refused(self, model):
        handle = HALF.attach(model)
        try:
            with pytest.raises(UnsupportedError, match="counts positions, which a cut changes"):
                handle.compile_prefill("eager")
        finally:
            handle.detach()

    def test_a_token_outside_of_the_context_is_refused(self, model):
        arguments = zoo.inputs("llama4", model)
        with FastV(Budget.tokens(4))(model):
            conversation = oracle.Conversation(model, arguments)
        with pytest.raises(UnsupportedError, match="a window of 16 positions would be counted"):
            conversation.feed(torch.tensor([[7]]))

    def test_it_counts_positions_outside_of_the_context_too(self):
        """Where no chunk ends, the model goes on by itself."""
        family = zoo.CORE["llama4"]
        config = family.config()
        config.text_config.attention_chunk_size = 64
        model = zoo.build_family(replace(family, config=lambda: config))
        arguments = zoo.inputs("llama4", model)
        with FastV(Budget.tokens(4))(model) as trace:
            conversation = oracle.Conversation(model, arguments)
        tokens = torch.tensor([[7], [8]]).T
        actual = torch.stack([conversation.feed(tokens[:, i : i + 1])[:, -1] for i in range(2)], 1)
        close(actual, expected(model, arguments, trace.samples, tokens)[:, 1:])
