"""The benchmark times what it says, in turns, and its stand-ins for a method do what they say."""

from __future__ import annotations

import dataclasses
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import autoprune
from autoprune import AutoPrune, Budget
from autoprune.bench import session
from autoprune.bench.clock import Clock
from autoprune.bench.floor import LayersAlone
from autoprune.bench.launches import Launches
from autoprune.bench.measure import PHASES, Held, Launched, count_once, time_once
from autoprune.bench.plot import plot_speedups
from autoprune.bench.policy import policy_seconds
from autoprune.bench.results import median_interval, padding_waste, rows
from autoprune.bench.session import Measured, Plan, measure
from autoprune.bench.subjects import Subject
from autoprune.bench.variants import (
    OVERHEADS,
    DecideOnly,
    Replay,
    SpreadAutoPrune,
    Variant,
    spread_curves,
)
from autoprune.methods.no_pruning import NoPruning
from autoprune.parts import selectors, transfer
from tests import zoo

CPU = torch.device("cpu")
NO_LAUNCHES = Launched(1, 1, 0)


@pytest.fixture(scope="module")
def subject():
    model = zoo.build("llava", "sdpa")
    single = zoo.inputs("llava", model)
    return Subject("llava", model, lambda n: {k: torch.cat([v] * n) for k, v in single.items()})


def plan(batches=(1, 3), budgets=(9, 6), repeats=2):
    names = [(name, b) for name in ("autoprune", "random") for b in budgets]
    pruned = [Variant(name, autoprune.create(name, b)) for name, b in names]
    keeps_all = [Variant(n, autoprune.create(n, Budget.ratio(1))) for n in ("autoprune", "random")]
    return Plan(batches, pruned, keeps_all, repeats, steps=2)


@torch.inference_mode()
def logits(subject, method=None):
    prompts = subject.prompts(2)
    if method is None:
        return subject.model(**prompts).logits, None
    with method(subject.model) as trace:
        return subject.model(**prompts).logits, trace.samples


@pytest.mark.parametrize("method", [NoPruning(), DecideOnly(AutoPrune(budget=6))])
def test_overhead_runs_change_nothing(subject, method):
    found, samples = logits(subject, method)
    assert torch.equal(found, logits(subject)[0])
    assert samples[0].tokens_per_layer == [16] * zoo.LAYERS


def test_decisions_alone_are_really_taken(subject):
    method = AutoPrune(budget=6, mi_layer=0)
    samples = logits(subject, DecideOnly(method))[1]
    pruned = logits(subject, method)[1]
    assert samples[0].schedule == pruned[0].schedule
    assert samples[0].mutual_information == pruned[0].mutual_information


@pytest.mark.parametrize("name", autoprune.list_methods())
def test_decisions_of_every_method_can_be_taken_alone(subject, name):
    found, samples = logits(subject, DecideOnly(autoprune.create(name, 9)))
    assert torch.equal(found, logits(subject)[0])
    assert samples[0].tokens_per_layer == [16] * zoo.LAYERS


def test_cuts_alone_repeat_a_schedule(subject):
    schedule = ((16, 9, 9, 4, 1, 1), (16, 16, 5, 5, 5, 2))
    samples = logits(subject, Replay(schedule))[1]
    assert [tuple(sample.tokens_per_layer) for sample in samples] == list(schedule)
    assert samples[1].kept[3].tolist() == [0, 1, 2, 3, 4]


@torch.inference_mode()
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "internvl", "qwen3_vl"])
def test_layers_alone_are_as_long_as_pruning_makes_them(name):
    model = zoo.build(name, "sdpa")
    inputs = zoo.inputs(name, model)
    with autoprune.create("fastv", 9)(model) as trace:
        pruned = model(**inputs).past_key_values
    plain, alone = model(**inputs).logits, LayersAlone.like(trace.samples)
    assert alone.lengths[0] > alone.lengths[-1]
    with alone(model):
        cut = model(**inputs, logits_to_keep=1).past_key_values
    lengths = [layer.keys.shape[2] for layer in cut.layers]
    assert lengths == [layer.keys.shape[2] for layer in pruned.layers] == list(alone.lengths)
    assert torch.equal(model(**inputs).logits, plain)


def test_layers_alone_have_a_batchs_mean_length():
    samples = [sample([8, 2], 2), sample([8, 5], 2)]
    assert LayersAlone.like(samples).lengths == (10, 6)


def test_curves_are_spread_over_a_batch_and_spend_the_same(subject):
    method = spread_curves(AutoPrune(budget=8, k0=2.0), 5.0)
    samples = logits(subject, method)[1]
    first, second = (sample.tokens_per_layer for sample in samples)
    assert first != second
    assert sum(first) == sum(second) == 8 * zoo.LAYERS
    measured = logits(subject, AutoPrune(budget=8, k0=2.0))[1]
    assert samples[1].mutual_information == measured[1].mutual_information
    assert first == AutoPrune(budget=8, k0=2.0).plan(zoo.LAYERS, 16, 0.0)
    assert second == AutoPrune(budget=8, k0=2.0).plan(zoo.LAYERS, 16, 5.0)


def test_a_single_prompt_keeps_its_own_curve(subject):
    method, alone = AutoPrune(budget=8, k0=2.0), subject.prompts(1)
    schedules = []
    for each in (method, spread_curves(method, 5.0)):
        with torch.inference_mode(), each(subject.model) as trace:
            subject.model(**alone)
        schedules.append(trace.samples[0].schedule)
    assert schedules[0] == schedules[1]


def test_only_autoprune_is_spread_and_keeps_its_settings():
    method = AutoPrune(budget=8, k0=0.7, first_cut="pre_llm")
    spread = spread_curves(method, 0.5)
    assert isinstance(spread, SpreadAutoPrune) and spread.high == 0.5
    assert all(
        getattr(spread, f.name) == getattr(method, f.name) for f in dataclasses.fields(method)
    )
    random = autoprune.create("random", 8)
    assert spread_curves(random, 0.5) is random and spread_curves(method, 0.0) is method


def test_phases_add_up_and_decoding_is_per_step(subject):
    class Steps:
        """A clock that counts its marks."""

        count = 0

        def mark(self):
            self.count += 1
            return self.count

        def settle(self):
            pass

        def seconds(self, marks):
            return [after - before for before, after in pairwise(marks)]

    clock = Steps()
    times = time_once(subject.model, subject.prompts(1), AutoPrune(budget=6), 3, clock)
    assert times == {"vision": 1, "prefill": 1, "ttft": 2, "decode": 1}
    assert clock.count == 3 + 3


def test_pictures_are_encoded_before_the_decoder_is_entered(subject):
    marks = []
    clock = SimpleNamespace(
        mark=lambda: marks.append("mark"),
        settle=lambda: None,
        seconds=lambda m: [1.0] * (len(m) - 1),
    )
    model = subject.model
    handles = [
        model.get_encoder(modality="image").register_forward_hook(lambda *_: marks.append("tower")),
        model.get_decoder().layers[0].register_forward_pre_hook(lambda *_: marks.append("layer 0")),
    ]
    time_once(model, subject.prompts(1), NoPruning(), 1, clock)
    for handle in handles:
        handle.remove()
    assert marks == ["mark", "tower", "mark", "layer 0", "mark", "layer 0", "mark"]


def test_variants_take_turns(subject, monkeypatch):
    order = []

    def pretend(model, prompts, method, steps, clock):
        order.append(method)
        return dict.fromkeys(PHASES, 1.0)

    monkeypatch.setattr(session, "time_once", pretend)
    asked = plan(batches=(1,), repeats=3)
    done = list(measure(subject, asked, Clock(CPU)))[-1]
    floors = [LayersAlone.like(own.held.samples) for own in done[1:5]]
    assert order[:4] == floors
    # A plain run, four pruned ones with their floors, and seven overheads.
    rounds = [order[4 + 16 * i : 20 + 16 * i] for i in range(3)]
    assert len(order) == 4 + 3 * 16
    for one in rounds:
        assert one[0] is None
        assert all(one.count(own.variant.method) == 1 for own in done)
        for variant, floor in zip(asked.pruned, floors, strict=True):
            assert one[one.index(variant.method) + 1] == floor
    assert rounds[0] != rounds[1] != rounds[2]
    assert [len(own.floor) for own in done] == [0, 3, 3, 3, 3] + [0] * 7
    asked_for = [(name, of) for of in ("autoprune", "random") for name in OVERHEADS[1:]]
    assert [(own.variant.label, own.variant.of) for own in done[5:]] == [
        ("hooks only", None),
        *asked_for,
    ]


def test_every_run_is_announced_and_overheads_are_measured_once(subject):
    asked = plan(repeats=1)
    states = list(measure(subject, asked, Clock(CPU)))
    assert len(states) == asked.runs == 2 * (5 + 5 + 7) + 2 * 4 * 2
    found = rows(states[-1])
    assert [row["batch"] for row in found if row["kind"] == "overhead"] == [1] * 7
    assert [row["batch"] for row in found if row["kind"] == "plain"] == [1, 3]


def test_overheads_are_those_of_each_method_at_its_cheapest_budget(subject):
    asked = plan(batches=(1,), repeats=1)
    done = list(measure(subject, asked, Clock(CPU)))[-1]
    found = rows(done)
    for name, pruned in (("autoprune", asked.pruned[1]), ("random", asked.pruned[3])):
        ours = next(r for r in found[1:] if (r["variant"], r["mean_tokens"]) == (name, 6))
        cuts = next(r for r in found if r["variant"] == "cuts only" and r["of"] == name)
        assert cuts["tokens_per_layer"] == ours["tokens_per_layer"]
        (decides,) = (
            own.variant
            for own in done
            if own.variant.label == "decisions only" and own.variant.of == name
        )
        assert decides.method.method == pruned.method
    schedules = [r["tokens_per_layer"] for r in found if r["variant"] == "cuts only"]
    assert schedules[0] != schedules[1]


def test_what_launches_a_kernel_is_counted():
    values = torch.ones(2, 3)
    with Launches() as launches:
        added = values + 1
        added.view(3, 2).t()
        torch.empty(5)
        added.sort(dim=1)
    assert launches.seen == {"add": 1, "sort": 1}
    # A sort is four kernels on CUDA.
    assert (launches.total, launches.copies) == (5, 0)


def test_a_copy_from_the_host_is_counted_wherever_it_is_asked_for():
    places = (transfer.to_device, selectors.to_device)
    with Launches() as launches:
        transfer.to_device([1, 2], CPU)
        selectors.to_device([3], CPU)
        transfer.all_to_device([np.arange(3), np.ones(2, dtype=bool), np.arange(2)], CPU)
    assert launches.copies == 3
    assert "lift_fresh" not in launches.seen
    assert (transfer.to_device, selectors.to_device) == places


def test_copies_are_counted_no_longer_once_counting_failed():
    place = transfer.to_device
    with pytest.raises(KeyError), Launches():
        raise KeyError
    assert transfer.to_device is place


def test_launches_around_the_decoder_count_as_the_decoders():
    held = Held(1, 1, [sample([8, 2], 2)])
    seconds = {phase: [1.0] for phase in PHASES}
    plain = Measured(1, Variant("plain"), held, Launched(100, 40, 0), seconds)
    method = autoprune.create("random", 5)
    pruned = Measured(1, Variant("random", method), held, Launched(130, 60, 3), seconds)
    before, after = rows([plain, pruned])
    assert (before["launches"], before["launches_ratio"], before["copies"]) == (40, 1, 0)
    assert (after["launches"], after["launches_ratio"], after["copies"]) == (70, 1.75, 3)


def test_with_flex_attention_nothing_is_counted(subject):
    config = SimpleNamespace(config=SimpleNamespace(_attn_implementation="flex_attention"))
    model = SimpleNamespace(get_decoder=lambda: config)
    assert count_once(model, subject.prompts(1), None) is None
    held = Held(1, 1, [sample([8, 2], 2)])
    (row,) = rows([Measured(1, Variant("plain"), held, None, {phase: [1.0] for phase in PHASES})])
    assert "launches" not in row and "copies" not in row


def test_cutting_launches_what_a_method_that_decides_nothing_does_not(subject):
    done = list(measure(subject, plan(batches=(1,), repeats=1), Clock(CPU)))[-1]
    found = {(r["variant"], r.get("of"), r.get("mean_tokens")): r["launches"] for r in rows(done)}
    plain, pruned = found["plain", None, None], found["autoprune", None, 6]
    cuts, decides = (
        found[name, "autoprune", n] for name, n in (("cuts only", 6), ("decisions only", 16))
    )
    assert plain <= found["hooks only", None, 16] < min(cuts, decides)
    assert max(cuts, decides) < pruned


def test_an_interrupted_run_leaves_the_model_as_it_was_and_what_was_measured(subject):
    plain = logits(subject)[0]
    left = iter(range(60))

    def interrupt(*_):
        if next(left, None) is None:
            raise KeyboardInterrupt

    handle = subject.model.get_decoder().layers[-1].register_forward_pre_hook(interrupt)
    states = measure(subject, plan(repeats=50), Clock(CPU))
    kept = next(states)
    with pytest.raises(KeyboardInterrupt):
        list(states)
    handle.remove()
    assert torch.equal(logits(subject)[0], plain)
    assert [row["variant"] for row in rows(kept)][:2] == ["plain", "autoprune"]


def sample(counts, text, flops=1.0):
    return SimpleNamespace(
        tokens_per_layer=counts, num_text=text, num_visual=counts[0], mean_tokens=np.mean(counts),
        flops=flops, total_flops=flops, flops_full=4.0, kv_bytes=1, kv_bytes_held=1, peak_bytes=1,
        mutual_information=None,
    )  # fmt: skip


def test_padding_is_counted_over_all_layers():
    assert padding_waste([sample([8, 2], 2), sample([8, 4], 2)]) == pytest.approx(32 / 30 - 1)
    assert padding_waste([sample([8, 2], 2)]) == 0
    assert padding_waste([sample([8, 2], 4), sample([8, 4], 2)]) == pytest.approx(36 / 34 - 1)


def test_realised_share_compares_rounds_with_what_flops_promise():
    held = Held(1, 1, [sample([8, 2], 2)])

    def taken(method, seconds):
        label = "plain" if method is None else "random"
        return Measured(
            1, Variant(label, method), held, NO_LAUNCHES, dict.fromkeys(PHASES, seconds)
        )

    plain = taken(None, [4.0, 8.0, 6.0])
    pruned = taken(autoprune.create("random", 5), [2.0, 4.0])
    pruned.floor = [1.0]
    row = rows([plain, pruned])[1]
    assert row["floor_share"] == 1 and row["floor_seconds"]["median"] == 1
    assert row["added_seconds"]["all"] == [1]
    assert row["ideal_speedup"] == 4
    assert row["speedup"]["prefill"]["all"] == [2, 2]
    assert row["realised_share"] == 0.5
    assert row["seconds"]["prefill"]["median"] == 3


@pytest.mark.parametrize(("count", "rank"), [(6, 1), (8, 1), (9, 2), (12, 3), (25, 8), (100, 40)])
def test_the_interval_of_a_median_is_that_of_the_sign_test(count, rank):
    # Ranks from the published tables of the sign test, 5 % on two sides.
    values = np.random.default_rng(0).permutation(count) + 1.0
    assert median_interval(values.tolist()) == (rank, count + 1 - rank)


def test_a_few_rounds_have_no_interval():
    assert median_interval([1.0] * 5) is None


def test_the_interval_of_a_median_holds_it_as_often_as_it_says():
    rng = np.random.default_rng(1)
    found = [median_interval(rng.exponential(size=20).tolist()) for _ in range(2000)]
    inside = np.mean([low < np.log(2) < high for low, high in found])
    assert 0.94 < inside < 0.98


def test_what_has_not_been_timed_yet_has_no_row():
    assert rows([Measured(1, Variant("plain"), Held(1, 1, []), NO_LAUNCHES)]) == []


def test_one_thread_is_timed_by_the_process():
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert Clock(CPU).name == "process time"
        torch.set_num_threads(2)
        assert Clock(CPU).name == "wall time"
    finally:
        torch.set_num_threads(threads)
    with pytest.raises(ValueError, match="cpu and cuda"):
        Clock(torch.device("meta"))


def test_planning_takes_little_time():
    # Targets are 0.2 ms and 2 ms; other programs on a busy machine may cost ten times that.
    assert policy_seconds(1) < 2e-3
    assert policy_seconds(64) < 20e-3


def test_the_plot_has_a_line_per_method_and_batch_size(subject):
    found = rows(list(measure(subject, plan(repeats=1), Clock(CPU)))[-1])
    axes = plot_speedups(found, "llava").axes[0]
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert sorted(labels) == sorted(
        ["as FLOPs promise"]
        + [f"{name}, batch {batch}" for name in ("autoprune", "random") for batch in (1, 3)]
    )
