"""FLOPs of `autoprune.policy.cost` are those that torch's own counter sees in the decoder."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from autoprune import AutoPrune
from autoprune.bench.variants import Replay
from autoprune.engine.locate import locate
from tests import zoo

VISUAL = 16


@pytest.fixture(scope="module", params=["llava", "qwen2_5_vl"])
def case(request):
    model = zoo.build(request.param, "sdpa")
    return model, zoo.inputs(request.param, model)


@torch.inference_mode()
def counted(model, inputs):
    """FLOPs inside the decoder. Fused attention hides its products from the counter, MATH does not."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(**inputs, logits_to_keep=1)
    modules = counter.get_flop_counts().items()
    return next(sum(n.values()) for name, n in modules if name.endswith("model.language_model"))


def test_the_plain_prefill_costs_what_torch_counts(case):
    model, inputs = case
    length = inputs["input_ids"].shape[1]
    cost = locate(model).cost
    assert counted(model, inputs) == cost.prefill_flops([length] * cost.layers)


def test_a_pruned_prefill_costs_what_torch_counts(case):
    model, inputs = case
    schedule = (VISUAL, VISUAL, 9, 5, 5, 1)
    assert len(schedule) == zoo.LAYERS
    with Replay((schedule,))(model) as trace:
        flops = counted(model, inputs)
    assert flops == trace.samples[0].flops < 0.8 * trace.samples[0].flops_full


def test_seeing_what_to_prune_costs_a_few_rows_of_attention(case):
    model, inputs = case
    with AutoPrune(budget=8)(model) as trace:
        flops = counted(model, inputs)
    # The last few text rows look at all keys once more, in layers before a cut; no values are summed.
    sample, cost = trace.samples[0], locate(model).cost
    rows, length = sample.num_text, sample.num_visual + sample.num_text
    most = (cost.layers - 1) * cost.attention_flops / 2 * rows * length
    assert 0 < flops - sample.flops <= most
