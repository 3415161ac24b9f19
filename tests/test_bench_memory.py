"""What a prefill allocates and what its cache holds, counted."""

from __future__ import annotations

import pytest
import torch

from autoprune import AutoPrune, create
from autoprune.bench.measure import hold_once
from autoprune.bench.memory import AllocationCounter, PeakMemory
from autoprune.bench.results import padding_waste
from autoprune.bench.variants import Replay, spread_curves
from autoprune.engine import cuts
from autoprune.methods.no_pruning import NoPruning
from tests import zoo

MEGABYTE = 1 << 20


@pytest.fixture(scope="module")
def model():
    return zoo.build("llava", "sdpa")


def prompts(model, batch):
    single = zoo.inputs("llava", model)
    return {name: torch.cat([tensor] * batch) for name, tensor in single.items()}


def megabyte():
    return torch.zeros(MEGABYTE // 4)


def test_the_peak_is_what_is_held_at_a_time():
    before = megabyte()
    with PeakMemory(torch.device("cpu")) as memory:
        memory.start()
        first = megabyte()
        second = first + before
        del first
        third = torch.cat([second, second])
        del second, third
        last = megabyte()
        peak = memory.stop()
    assert peak == 3 * MEGABYTE
    assert last.numel()


def test_views_and_operations_in_place_hold_nothing_new():
    tensor = megabyte()
    with AllocationCounter() as counter:
        tensor.view(2, -1).add_(1).t().relu_()
    assert counter.peak == 0


def test_nothing_is_counted_after_an_interruption():
    memory = PeakMemory(torch.device("cpu"))

    def interrupted():
        with memory:
            memory.start()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    later = megabyte()
    assert later.numel() and memory.stop() == 0


def test_a_cache_holds_what_the_trace_says(model):
    held = hold_once(model, prompts(model, 1), AutoPrune(budget=9))
    assert held.kv == held.samples[0].kv_bytes < held.samples[0].kv_bytes_full


def test_a_batch_of_equal_curves_holds_what_the_trace_says(model):
    held = hold_once(model, prompts(model, 3), AutoPrune(budget=9))
    assert padding_waste(held.samples) == 0
    assert held.kv == sum(sample.kv_bytes for sample in held.samples)


def test_a_ragged_batch_also_holds_its_padding(model):
    held = hold_once(model, prompts(model, 4), spread_curves(AutoPrune(budget=9, k0=2.0), 6.0))
    waste = padding_waste(held.samples)
    assert waste > 0.01
    assert held.kv == pytest.approx((1 + waste) * sum(s.kv_bytes for s in held.samples))
    assert held.kv == sum(s.kv_bytes_held for s in held.samples)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("method", [AutoPrune(budget=9, k0=2.0), create("random", 5)])
def test_a_batch_of_different_prompts_holds_what_the_trace_says(model, side, method):
    batch = zoo.inputs("llava", model, "padded3_text", padding_side=side)
    held = hold_once(model, batch, method)
    assert held.kv == sum(s.kv_bytes_held for s in held.samples)
    assert held.kv > sum(s.kv_bytes for s in held.samples)


def test_the_peak_of_a_ragged_batch_is_what_the_trace_says():
    model = wide("llava")
    method = spread_curves(AutoPrune(budget=9, k0=2.0), 6.0)
    held = hold_once(model, prompts(model, 4), method)
    assert padding_waste(held.samples) > 0.01
    # What cuts are planned with is not counted: a few numbers for each token.
    assert held.peak == pytest.approx(sum(s.peak_bytes for s in held.samples), rel=0.04)


@pytest.mark.parametrize("packed", [True, False])
def test_the_peak_knows_whether_layers_compute_padding(packed, monkeypatch):
    if not packed:
        monkeypatch.setattr(cuts, "WORTH_PACKING", float("inf"))
    model = wide("llava")
    counts = [14, 1, 1, 1]
    method = Replay(tuple((n,) * zoo.LAYERS for n in counts))
    held = hold_once(model, prompts(model, len(counts)), method)
    assert padding_waste(held.samples) > 0.5
    assert held.peak == pytest.approx(sum(s.peak_bytes for s in held.samples), rel=0.02)


def test_the_plain_cache_holds_all(model):
    plain = hold_once(model, prompts(model, 2), None)
    hooked = hold_once(model, prompts(model, 2), NoPruning())
    assert plain.samples == []
    assert plain.kv == hooked.kv == sum(sample.kv_bytes_full for sample in hooked.samples)


def test_pruning_lowers_the_peak_by_what_the_cache_lacks(model):
    layers, batch = zoo.LAYERS, 8
    schedule = [16] + [1] * (layers - 1)
    plain = hold_once(model, prompts(model, batch), None)
    pruned = hold_once(model, prompts(model, batch), Replay((tuple(schedule),) * batch))
    # Layer 0 sees all tokens in both: what a layer needs at a time is the same.
    assert pruned.peak <= plain.peak - 0.8 * (plain.kv - pruned.kv) < plain.peak


def wide(name):
    """A model of the family whose decoder's width outweighs indices and masks, as in real ones."""
    family, width = zoo.FAMILIES[name], 256
    config = family.config()
    text, vision = config.get_text_config(), config.vision_config
    times = width // text.hidden_size
    if getattr(vision, "out_hidden_size", None) == text.hidden_size:
        vision.out_hidden_size = width
    text.hidden_size, text.intermediate_size = width, 704
    text.num_attention_heads *= times
    text.num_key_value_heads *= times
    return zoo.class_of(family)._from_config(config).eval()


# Towers whose features are as wide as the decoder cannot be left as they are here.
NARROW = {"qwen2_vl", "paligemma", "paligemma2"}
# A picture of 8 tokens, of which the budgets here drop none.
FEW = {"senna"}
# Gemma 3 has two sets of rotary embeddings. CogVLM's experts run one after the other, each on its own tokens.
CLOSE = {"gemma3": 0.035, "cogvlm": 0.06}


@pytest.mark.parametrize("name", sorted(zoo.FAMILIES.keys() - NARROW - FEW))
def test_the_peak_is_what_the_trace_says(name):
    model = wide(name)
    close = CLOSE.get(name, 0.02)
    inputs = zoo.inputs(name, model)
    plain = hold_once(model, inputs, None)
    for method in (AutoPrune(budget=9), create("random", 5), create("fastv", 9), create("dart", 9)):
        held = hold_once(model, inputs, method)
        (sample,) = held.samples
        assert held.peak == pytest.approx(sample.peak_bytes, rel=close)
        assert plain.peak == pytest.approx(sample.peak_bytes_full, rel=close)
        assert held.peak < plain.peak


def many_pictures(model, number=12):
    """A prompt of many pictures and little text, in which a look ahead takes the most memory."""
    inputs = zoo.inputs("llava", model)
    ids = inputs["input_ids"]
    visual = ids[ids == zoo.IMAGE].repeat(number)[None]
    ids = torch.cat([ids[:, :1], visual, ids[:, -3:]], dim=1)
    pixels = inputs["pixel_values"].repeat(number, 1, 1, 1)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}


@pytest.mark.parametrize(
    "method",
    [AutoPrune(budget=2, first_cut="peek"), create("pdrop", 60), create("pact", 60)],
    ids=str,
)
def test_the_peak_of_a_look_ahead_is_what_the_trace_says(method):
    model = wide("llava")
    held = hold_once(model, many_pictures(model), method)
    (sample,) = held.samples
    assert held.peak == pytest.approx(sample.peak_bytes, rel=0.02)


def test_the_peak_of_a_batch_is_the_sum():
    model = wide("llava")
    for method in (AutoPrune(budget=9), create("random", 5)):
        held = hold_once(model, prompts(model, 4), method)
        assert padding_waste(held.samples) == 0
        assert held.peak == pytest.approx(sum(s.peak_bytes for s in held.samples), rel=0.02)
