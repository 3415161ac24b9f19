"""What `cut_every="auto"` is decided by: the measured speed of a device."""

from __future__ import annotations

import pytest
import torch

from autoprune import AutoPrune, Budget, per_prompt
from autoprune.engine import speed
from autoprune.engine.locate import locate
from autoprune.policy.time_model import DeviceSpeed
from tests import zoo

FAMILIES = ["llava", "qwen2_5_vl", "gemma3", "internvl", "deepseek_vl_v2"]


@pytest.mark.parametrize("name", [name for name in FAMILIES if name in zoo.FAMILIES])
def test_the_parts_of_a_prefill_are_measured_once(name, monkeypatch):
    monkeypatch.setattr(speed, "_measured", {})
    located = locate(zoo.build(name, "sdpa"))
    found = speed.device_speed(located)
    assert 0 < found.cut_launch_s < found.layer_launch_s < 1
    assert found.cut_launch_s < found.ranking_launch_s < 1
    assert 1e6 < found.flops_per_s < 1e15
    monkeypatch.setattr(speed, "_measure", lambda *_: 1 / 0)
    assert speed.device_speed(located) is found


def told(monkeypatch, *numbers):
    monkeypatch.setattr("autoprune.engine.context.device_speed", lambda _: DeviceSpeed(*numbers))


@torch.inference_mode()
def test_the_trace_says_what_was_decided_and_why(monkeypatch):
    model = zoo.build("llava", "sdpa")
    inputs = zoo.inputs("llava", model, "padded3")
    auto = AutoPrune(Budget.ratio(0.5), cut_every="auto")
    told(monkeypatch, 0, 1e-9, 1e-9, 1)
    with auto(model) as trace:
        model(**inputs)
    pruned = [s for s in trace.samples if s.num_visual]
    assert pruned[0].decision.startswith("Cuts in every layer: the prefill is predicted to take")
    assert pruned[0].to_dict()["decision"] == pruned[0].decision
    assert all(sum(s.tokens_per_layer) < s.num_visual * zoo.LAYERS for s in pruned)
    told(monkeypatch, 1, 1, 1, 1e15)
    with auto(model) as trace:
        model(**inputs)
    whole = [s for s in trace.samples if s.num_visual]
    assert whole[0].decision.startswith("Nothing is pruned")
    assert all(s.tokens_per_layer == [s.num_visual] * zoo.LAYERS for s in whole)


def test_a_method_that_asks_for_no_speed_measures_none(monkeypatch):
    monkeypatch.setattr("autoprune.engine.context.device_speed", lambda _: 1 / 0)
    model = zoo.build("llava", "sdpa")
    inputs = zoo.inputs("llava", model, "single")
    with AutoPrune(Budget.ratio(0.5))(model) as trace, torch.no_grad():
        model(**inputs)
    assert trace.samples[0].decision is None
    with pytest.raises(ZeroDivisionError):
        AutoPrune(Budget.ratio(0.5), cut_every="auto")(model)


@torch.inference_mode()
def test_each_prompt_has_its_own_methods_decision(monkeypatch):
    model = zoo.build("llava", "sdpa")
    inputs = zoo.inputs("llava", model, "padded3")
    told(monkeypatch, 1, 1, 1, 1e15)
    methods = [AutoPrune(Budget.ratio(0.5), cut_every="auto"), AutoPrune(Budget.ratio(0.5))]
    batch = len(inputs["input_ids"])
    with per_prompt([methods[i % 2] for i in range(batch)])(model) as trace:
        model(**inputs)
    for i, sample in enumerate(trace.samples):
        if sample.num_visual:
            whole = sample.tokens_per_layer == [sample.num_visual] * zoo.LAYERS
            assert whole == (i % 2 == 0)
