"""FLOPs and KV bytes: against numbers worked out by hand and against torch's own counter."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from autoprune import AutoPrune, Budget
from autoprune.policy.cost import DecoderCost, released_prefill_macs
from autoprune.policy.released import (
    first_cut_count,
    released_keep_fractions,
    released_runtime_counts,
)

LLAVA_7B = DecoderCost(32, 4096, 32, 32, 128, 11008, vocab_size=32064)


def test_llava_7b_by_hand():
    projections = 4 * 4096 * 4096
    mlp = 3 * 4096 * 11008
    assert LLAVA_7B.linear_flops == 2 * (projections + mlp) == 404_750_336
    assert LLAVA_7B.attention_flops == 2 * 2 * 4096
    tokens = 576 + 71
    layer = 404_750_336 * tokens + 16_384 * tokens * tokens
    assert LLAVA_7B.layer_flops(tokens) == layer
    assert LLAVA_7B.prefill_flops([576] * 32, 71) == 32 * layer == 8_599_422_631_936
    assert LLAVA_7B.prefill_flops([576] * 32, 71, lm_head=True) == 32 * layer + 2 * 4096 * 32064
    assert LLAVA_7B.kv_bytes([576] * 32, 71) == 32 * 647 * 2 * 4096 * 2
    assert LLAVA_7B.decode_flops([576] * 32, 71) == 32 * (404_750_336 + 16_384 * 648)


def test_grouped_query_attention_and_head_dim():
    qwen = DecoderCost(28, 3584, 28, 4, 128, 18944)
    assert qwen.linear_flops == 2 * (2 * 3584 * 3584 + 2 * 3584 * 512 + 3 * 3584 * 18944)
    assert qwen.attention_flops == 4 * 3584
    assert qwen.kv_bytes_per_token == 2 * 4 * 128 * 2
    wide_heads = DecoderCost(26, 1152, 4, 1, 256, 6912)
    assert wide_heads.linear_flops == 2 * (2 * 1152 * 1024 + 2 * 1152 * 256 + 3 * 1152 * 6912)


def test_plain_mlp_has_two_matrices():
    plain = DecoderCost(1, 64, 4, 4, 16, 256, gated_mlp=False)
    assert plain.linear_flops == 2 * (4 * 64 * 64 + 2 * 64 * 256)


@pytest.mark.parametrize("visual", [[9, 5, 1], [0, 0, 0]])
def test_equals_torchs_flop_counter_on_a_small_decoder(visual):
    cost = DecoderCost(layers=3, hidden=32, heads=4, kv_heads=2, head_dim=8, intermediate=48)
    text = 7

    def run_layer(tokens: int) -> None:
        x = torch.zeros(tokens, 32)
        q, k, v = x @ torch.zeros(32, 32), x @ torch.zeros(32, 16), x @ torch.zeros(32, 16)
        q = q.view(tokens, 4, 8).transpose(0, 1)
        k, v = (t.view(tokens, 2, 8).transpose(0, 1).repeat_interleave(2, 0) for t in (k, v))
        mixed = torch.bmm(torch.bmm(q, k.transpose(1, 2)).softmax(-1), v)
        x = mixed.transpose(0, 1).reshape(tokens, 32) @ torch.zeros(32, 32)
        (x @ torch.zeros(32, 48) * (x @ torch.zeros(32, 48))) @ torch.zeros(48, 32)

    with FlopCounterMode(display=False) as counter:
        for count in visual:
            run_layer(count + text)
    assert cost.prefill_flops(visual, text) == counter.get_total_flops()


def test_batches_are_rows():
    visual = np.array([[576] * 32, list(range(64, 32, -1))])
    text = np.array([71, 5])
    for method in (LLAVA_7B.prefill_flops, LLAVA_7B.decode_flops, LLAVA_7B.kv_bytes):
        rows = [method(visual[i].tolist(), int(text[i])) for i in range(2)]
        assert all(isinstance(value, int) for value in rows)
        assert method(visual, text).tolist() == rows


def test_numbers_stay_exact_beyond_double_precision():
    large = DecoderCost(80, 8192, 64, 8, 128, 29568)
    tokens = 100_003
    expected = 80 * (large.linear_flops * tokens + large.attention_flops * tokens * tokens)
    assert expected > 2**53
    assert large.prefill_flops([tokens] * 80) == expected


def test_reads_a_text_config():
    config = SimpleNamespace(
        model_type="qwen2", num_hidden_layers=28, hidden_size=3584, num_attention_heads=28,
        num_key_value_heads=4, intermediate_size=18944, vocab_size=152064, hidden_act="silu",
    )  # fmt: skip
    expected = DecoderCost(28, 3584, 28, 4, 128, 18944, vocab_size=152064, dtype_bytes=4)
    assert DecoderCost.from_config(config, dtype_bytes=4) == expected
    assert DecoderCost.from_config(SimpleNamespace(text_config=config), 4) == expected
    composite = SimpleNamespace(get_text_config=lambda decoder=False: config)
    assert DecoderCost.from_config(composite, 4) == expected
    assert DecoderCost.from_config(SimpleNamespace(get_text_config=lambda: config), 4) == expected


def test_reads_explicit_head_dim_missing_kv_heads_and_plain_families():
    config = SimpleNamespace(
        model_type="opt", num_hidden_layers=2, hidden_size=64, num_attention_heads=4, ffn_dim=256,
        head_dim=None, num_key_value_heads=None,
    )  # fmt: skip
    cost = DecoderCost.from_config(config)
    assert cost == DecoderCost(2, 64, 4, 4, 16, 256, gated_mlp=False)
    config.head_dim, config.model_type = 32, "llama"
    cost = DecoderCost.from_config(config)
    assert (cost.head_dim, cost.gated_mlp) == (32, True)


def test_mixture_of_experts_counts_the_active_ones():
    config = SimpleNamespace(
        model_type="qwen3_moe", num_hidden_layers=2, hidden_size=64, num_attention_heads=4,
        intermediate_size=999, moe_intermediate_size=24, num_experts_per_tok=8,
    )  # fmt: skip
    assert DecoderCost.from_config(config).intermediate == 8 * 24


def test_llama_4_has_a_shared_expert_beside_the_chosen_ones():
    config = SimpleNamespace(
        model_type="llama4_text", num_hidden_layers=2, hidden_size=64, num_attention_heads=4,
        intermediate_size=24, num_experts_per_tok=1, interleave_moe_layer_step=1,
    )  # fmt: skip
    assert DecoderCost.from_config(config).intermediate == 24 + 24


def test_layers_that_differ_are_counted_one_by_one():
    """Two layers: one has keys of its own, one reads those and has an MLP of twice the width."""
    config = SimpleNamespace(
        model_type="gemma4_text", num_hidden_layers=2, hidden_size=10, num_attention_heads=2,
        num_key_value_heads=1, head_dim=4, intermediate_size=7, hidden_size_per_layer_input=3,
        num_kv_shared_layers=1, use_double_wide_mlp=True, layer_types=["full_attention"] * 2,
    )  # fmt: skip
    cost = DecoderCost.from_config(config)
    # Queries, output, keys and values; gate, up and down; the layer's input and what is made of it.
    first = 10 * 8 + 8 * 10 + 2 * 10 * 4 + 3 * 10 * 7 + 2 * 10 * 3
    second = 10 * 8 + 8 * 10 + 3 * 10 * 14 + 2 * 10 * 3
    pairs = 2 * (8 + 8)
    assert cost.prefill_flops([5, 3]) == 2 * first * 5 + pairs * 25 + 2 * second * 3 + pairs * 9
    assert cost.decode_flops([5, 3]) == 2 * first + pairs * 6 + 2 * second + pairs * 4
    assert cost.kv_bytes([5, 3]) == 5 * 2 * 4 * 2
    assert cost.differs == "these 2 are of 2 kinds"


def test_numbers_for_each_layer_are_refused_by_name():
    config = SimpleNamespace(
        num_hidden_layers=2, hidden_size=64, num_attention_heads=4, intermediate_size=[64, 128]
    )
    with pytest.raises(ValueError, match=r"intermediate_size is \[64, 128\], where one number"):
        DecoderCost.from_config(config)


def test_tying_the_lm_head_changes_no_flops():
    config = SimpleNamespace(
        num_hidden_layers=2, hidden_size=64, num_attention_heads=4, intermediate_size=128,
        vocab_size=512, tie_word_embeddings=False,
    )  # fmt: skip
    untied = DecoderCost.from_config(config)
    config.tie_word_embeddings = True
    tied = DecoderCost.from_config(config)
    assert tied.prefill_flops([3, 3], lm_head=True) == untied.prefill_flops([3, 3], lm_head=True)
    assert untied.lm_head_flops == 2 * 64 * 512


def test_errors_name_what_is_missing():
    with pytest.raises(ValueError, match="has no hidden_size or n_embd"):
        DecoderCost.from_config(SimpleNamespace(num_hidden_layers=2))
    with pytest.raises(ValueError, match=r"visual_per_layer must be \[32\] or \[batch, 32\]"):
        LLAVA_7B.prefill_flops([576] * 31)
    with pytest.raises(ValueError, match="layers must be at least 1, got 0"):
        DecoderCost(0, 64, 4, 4, 16, 256)


# Reduction in percent over text lengths, and mean visual tokens entering a layer, at k = 0.2.
TEXT_LENGTHS = (0, 35, 60, 71, 90, 128)
RELEASED_TABLE = {
    192: ((64.02, 60.44, 58.12, 57.15, 55.56, 52.64), 209.5),
    128: ((75.06, 70.86, 68.14, 67.01, 65.14, 61.72), 145.6),
    64: ((86.01, 81.20, 78.08, 76.79, 74.65, 70.73), 81.8),
}


@pytest.mark.parametrize("target", RELEASED_TABLE)
def test_released_counter_gives_the_known_savings_on_llava_7b(target):
    savings, mean_entering = RELEASED_TABLE[target]
    first = first_cut_count(target, 576)
    schedule = released_keep_fractions(32, 576, target, first, x0=14.9, k=0.2)
    visual = np.array(released_runtime_counts(first, schedule.fractions, 576).entering(576))
    assert visual.mean() == pytest.approx(mean_entering, abs=0.05)
    for text, expected in zip(TEXT_LENGTHS, savings, strict=True):
        dense = released_prefill_macs([576 + text] * 32, 4096, 11008)
        pruned = released_prefill_macs(visual + text, 4096, 11008)
        assert 100 * (1 - pruned / dense) == pytest.approx(expected, abs=0.02)


def test_released_counter_is_half_of_ours_for_multi_head_attention():
    visual = np.arange(100, 68, -1)
    assert 2 * released_prefill_macs(visual + 71, 4096, 11008) == LLAVA_7B.prefill_flops(visual, 71)
    batch = np.stack([visual, visual + 1])
    assert released_prefill_macs(batch, 8, 16).shape == (2,)


def test_peak_bytes_of_the_fullest_layer():
    cost = DecoderCost(
        layers=3, hidden=8, heads=2, kv_heads=1, head_dim=4, intermediate=20, dtype_bytes=2
    )
    kv, mlp, width, rotary = 2 * 4 * 2, 3 * 20 * 2, 8 * 2, 2 * 4 * 2
    # Unpruned, the last layer: all of the cache, what enters, the residual and the normed states.
    assert cost.peak_bytes([6, 6, 6], 4) == 10 * (3 * kv + mlp + 3 * width + rotary)
    # Cut behind layer 0: its own input was there before.
    first = 10 * (kv + mlp + 2 * width + rotary)
    assert cost.peak_bytes([6, 0, 0], 4) == first
    # Cut mildly: the states before the cut, and rotary embeddings of the whole prompt, twice, and of
    # what is left, are held in layer 1.
    second = 9 * (kv + mlp + 3 * width + rotary) + 10 * (kv + width + 2 * rotary)
    assert cost.peak_bytes([6, 5, 0], 4) == max(first, second) == second
    # Cut before the decoder.
    third = 6 * (3 * kv + mlp + 3 * width + rotary) + 10 * 2 * rotary
    assert cost.peak_bytes([2, 2, 2], 4, num_visual=6) == third
    assert cost.peak_bytes([2, 2, 2], 4, num_visual=6, observed=[0, 0, 7]) == third + 7
    assert cost.peak_bytes([[6, 6, 6], [6, 5, 0]], [4, 4]).tolist() == [
        cost.peak_bytes([6, 6, 6], 4), second,
    ]  # fmt: skip
    several = cost.peak_bytes([[2, 2, 2], [6, 6, 6]], 4, num_visual=6, observed=[0.0, 0.0, 7.0])
    assert several.dtype == np.int64
    assert several.tolist() == [third + 7, cost.peak_bytes([6, 6, 6], 4) + 7]
    plain = DecoderCost(
        layers=3, hidden=8, heads=2, kv_heads=1, head_dim=4, intermediate=20, gated_mlp=False
    )
    assert cost.peak_bytes([6] * 3, 4) - plain.peak_bytes([6] * 3, 4) == 10 * 20 * 2


def test_prompts_that_are_too_long_to_be_counted_are_refused():
    cost = DecoderCost(32, 4096, 32, 32, 128, 11008)
    with pytest.raises(ValueError, match="beyond what is counted exactly"):
        cost.prefill_flops([5_000_000] * 32)
    with pytest.raises(ValueError, match="beyond what is counted exactly"):
        AutoPrune(Budget.flops(0.5)).plan(32, 5_000_000, 1.0, 0, cost)
