"""Decoders some of whose layers do not attend, but pass a state on: linear attention and convolutions.

A dropped token is not there for such a layer: it runs as if the tokens that are left stood next to each other.
"""

from __future__ import annotations

import functools

import pytest
import torch

from autoprune import AutoPrune, Budget
from autoprune.engine.cache.argument import cache_of
from autoprune.errors import UnsupportedError
from autoprune.methods.fastv import FastV
from autoprune.methods.tome import ToMe
from autoprune.policy.cost import DecoderCost
from tests import oracle, zoo
from tests.engine.test_core_families import RANKED_BEFORE
from tests.scattered import DEEP, PRE_LLM, Scattered

TOLERANCE = 2e-4
NAMES = ["qwen3_5", "lfm2_vl"]
DOES_NOT_ATTEND = [0, 2, 3, 5]
model_of = functools.cache(zoo.build)
pytestmark = pytest.mark.parametrize("name", NAMES)


def expected(model, arguments, samples, tokens):
    columns = oracle.columns_from_trace(samples, arguments["attention_mask"], zoo.LAYERS)
    return oracle.oracle_logits(model, arguments, columns, tokens)


@pytest.mark.parametrize("schedules", [DEEP, PRE_LLM], ids=["deep", "pre_llm"])
def test_cuts_before_any_layer_equal_the_oracle(name, schedules):
    model = model_of(name, "sdpa")
    arguments = zoo.inputs(name, model, "padded3")
    result = oracle.compare(model, arguments, Scattered(schedules), steps=3)
    assert result.worst < TOLERANCE
    assert max(result.effect) > 1.0


def test_a_state_reaches_far_enough_for_a_wrong_one_to_be_seen(name):
    """In the oracle, a token that is only dropped from a layer without attention changes those behind it."""
    model = model_of(name, "sdpa")
    arguments = zoo.inputs(name, model, "single")
    whole = torch.ones_like(arguments["attention_mask"], dtype=torch.bool)
    kept = whole & ~zoo.visual_mask(model, arguments["input_ids"])
    columns = [whole] * 5 + [kept]  # the last layer does not attend
    text = int(zoo.visual_mask(model, arguments["input_ids"])[0].nonzero()[-1]) + 1
    plain = oracle.oracle_forward(model, arguments, [whole] * 6)
    change = (oracle.oracle_forward(model, arguments, columns) - plain)[0, text:].abs()
    assert change.max() > 1.0


def test_a_right_padded_forward_equals_the_oracle(name):
    model = model_of(name, "sdpa")
    arguments = zoo.inputs(name, model, "padded3", padding_side="right")
    with Scattered(DEEP)(model) as trace, torch.no_grad():
        logits = model(**arguments).logits
    columns = oracle.columns_from_trace(trace.samples, arguments["attention_mask"], zoo.LAYERS)
    whole = oracle.oracle_forward(model, arguments, columns)
    last = arguments["attention_mask"].sum(dim=1) - 1
    rows = torch.arange(3)
    torch.testing.assert_close(logits[rows, last], whole[rows, last], atol=TOLERANCE, rtol=0)


def test_a_batch_without_a_cache_equals_the_oracle(name):
    model = model_of(name, "sdpa")
    arguments = zoo.inputs(name, model, "padded3")
    with Scattered(DEEP)(model) as trace, torch.no_grad():
        actual = model(**arguments, use_cache=False).logits[:, -1:]
    slow = expected(model, arguments, trace.samples, None)
    torch.testing.assert_close(actual, slow, atol=TOLERANCE, rtol=0)


def test_beams_equal_those_of_the_oracle(name):
    model = model_of(name, "sdpa")
    arguments = zoo.inputs(name, model, "padded3_text")
    pruned, slow = oracle.beam_search(model, arguments, RANKED_BEFORE, beams=2, tokens=4)
    assert torch.equal(pruned, slow)


def test_a_second_turn_of_several_tokens_equals_the_oracle(name):
    model = model_of(name, "sdpa")
    arguments = zoo.inputs(name, model, "padded3_text")
    turn = torch.tensor([[7, 8, 9]]).expand(3, -1)
    with RANKED_BEFORE(model) as trace:
        conversation = oracle.Conversation(model, arguments)
        actual = conversation.feed(turn)[:, -1]
    slow = expected(model, arguments, trace.samples, turn)[:, -1]
    torch.testing.assert_close(actual, slow, atol=TOLERANCE, rtol=0)


def test_rankings_stand_behind_layers_that_attend(name):
    model = model_of(name, "sdpa")
    handle = RANKED_BEFORE.attach(model)
    shape = handle.shape
    handle.detach()
    assert shape.attending == tuple(layer not in DOES_NOT_ATTEND for layer in range(6))
    every = AutoPrune(Budget.ratio(0.5), first_cut="pre_llm", mi_layer=1, rank_every=1)
    windows = [every._window_of(cut, shape) for cut in range(6)]
    assert windows == [(0, 2), (0, 2), (2, 5), (2, 5), (2, 5), (5, 6)]


def test_attention_of_a_layer_without_any_is_refused(name):
    model = model_of(name, "sdpa")
    arguments = zoo.inputs(name, model, "single")
    for method, cut, layer in [
        (AutoPrune(Budget.ratio(0.5)), 1, 0),
        (AutoPrune(Budget.ratio(0.5), first_cut="pre_llm", mi_layer=2), 3, 2),
        (AutoPrune(Budget.ratio(0.5), first_cut="peek", mi_layer=1), 0, 0),
    ]:
        with (
            pytest.raises(UnsupportedError, match=f"before layer {cut} .* of layer {layer}, which"),
            method(model),
        ):
            model(**arguments)
    with pytest.raises(UnsupportedError) as caught, FastV(Budget.ratio(0.9), layer=16)(model):
        model(**arguments)
    text = type(model.get_decoder()).__name__
    assert str(caught.value) == (
        "the cut before layer 3 is decided by the attention of layer 2, which has none: of the layers of "
        f"{text} only 1, 4 attend; let the method look at one of these (AutoPrune: first_cut='pre_llm', "
        "mi_layer=1), or take one that ranks before the decoder"
    )


def test_what_counts_layers_as_alike_is_refused(name):
    model = model_of(name, "sdpa")
    arguments = zoo.inputs(name, model, "single")
    pre_llm = functools.partial(AutoPrune, first_cut="pre_llm", mi_layer=1)
    for method, reason in [
        (pre_llm(Budget.ratio(0.5), merger="summary"), "a summary of dropped tokens needs"),
        (pre_llm(Budget.ratio(0.5), positions="compacted"), "ositions"),
        (pre_llm(Budget.ratio(0.5), cut_every="auto"), "use a number"),
    ]:
        with pytest.raises(UnsupportedError, match=reason):
            method(model)
    for budget in (Budget.kv_bytes(20_000), Budget.flops(0.5)):
        with (
            pytest.raises(ValueError, match="4 of these 6 do not attend; give a budget of tokens"),
            pre_llm(budget)(model),
        ):
            model(**arguments)
    with pytest.raises(UnsupportedError, match="static cache"), RANKED_BEFORE(model):
        model.generate(**arguments, max_new_tokens=2, cache_implementation="static")
    with (
        pytest.raises(UnsupportedError, match="cannot count a token for several"),
        ToMe(8, proportional=True)(model),
    ):
        model(**arguments)


def test_merging_at_every_cut_is_refused_as_not_every_layer_attends(name):
    """The cuts behind layers without attention would be left out, and the budget overspent."""
    model = zoo.build(name)
    method = AutoPrune(6, first_cut="pre_llm", mi_layer=1, merger="dpc_knn")
    with pytest.raises(ValueError, match=r"merges at every cut .* have none"), method(model):
        pass


def test_the_bytes_of_the_cache_are_those_of_layers_that_attend(name):
    model = model_of(name, "sdpa")
    with RANKED_BEFORE(model) as trace, torch.no_grad():
        cache = cache_of(model(**zoo.inputs(name, model, "single"), use_cache=True))
    held = sum(
        cache.layers[layer].keys.nbytes + cache.layers[layer].values.nbytes for layer in (1, 4)
    )
    sample = trace.samples[0]
    cost = DecoderCost.from_config(model.config, dtype_bytes=4)
    text = cache.get_seq_length() - sample.num_visual
    assert cost.kv_bytes(sample.tokens_per_layer, text) == held


def test_flops_are_those_counted_by_hand(name):
    """10 tokens; 2 FLOPs for each weight and token, and for each pair of tokens and dimension twice."""
    cost = DecoderCost.from_config(zoo.CORE[name].config())
    mlp = 3 * 64 * 96
    attention = 64 * 64 * 2 + 64 * 32 * 2 + (64 * 64 if name == "qwen3_5" else 0)
    if name == "qwen3_5":
        # Queries, keys (2 heads of 8), values, gate and output (4 heads of 8), and two numbers for each head;
        # a convolution over 4 tokens; three products of a state of 8 x 8 for each head.
        mixer = 64 * (2 * 16 + 3 * 32 + 2 * 4) + (2 * 16 + 32) * 4 + 3 * 4 * 8 * 8
    else:
        mixer = 64 * 3 * 64 + 64 * 64 + 64 * 3
    expected = 2 * 10 * (6 * mlp + 2 * attention + 4 * mixer) + 2 * 10 * 10 * 4 * 64
    assert cost.prefill_flops([4] * 6, 6) == expected
    step = 2 * (6 * mlp + 2 * attention + 4 * mixer) + 2 * 11 * 4 * 64
    assert cost.decode_flops([4] * 6, 6) == step
