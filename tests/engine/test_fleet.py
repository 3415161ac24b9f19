"""Budgets over a batch and a stream through the model: what is really spent, and the oracle's logits."""

from __future__ import annotations

import functools
import threading

import pytest
import torch

from autoprune import AutoPrune, AutoPruneReference, Budget, Fleet, create, list_methods, per_prompt
from autoprune.policy.fleet import FleetState
from autoprune.policy.rules import InformationRule
from tests import oracle, zoo

TOLERANCE = 2e-4
LAYERS = zoo.LAYERS
model_of = functools.cache(zoo.build)
SETTINGS = {
    "tokens": Budget.tokens(9, over="batch"),
    "ratio": Budget.ratio(0.5, over="batch"),
    "flops": Budget.flops(0.72, over="batch"),
    "kv_bytes": Budget.kv_bytes(38_000, over="batch"),
}


def uneven(prompts, tokens):
    """The first prompt of a batch is the neediest."""
    weight = torch.arange(len(prompts), 0, -1.0).numpy() ** 2
    return -weight[:, None] * tokens[None] ** 0.5


def spent(budget, samples):
    """What the samples say was spent, and what each prompt may spend alone."""
    if budget.kind == "flops":
        done = [s.flops for s in samples]
        return done, [int(budget.value * s.flops_full) for s in samples]
    if budget.kind == "kv_bytes":
        return [s.kv_bytes for s in samples], [min(budget.value, s.kv_bytes_full) for s in samples]
    mean = [budget.value * (s.num_visual if budget.kind == "ratio" else 1) for s in samples]
    allowed = [
        min(round(LAYERS * m), LAYERS * s.num_visual) for m, s in zip(mean, samples, strict=True)
    ]
    return [sum(s.tokens_per_layer) for s in samples], allowed


@pytest.mark.parametrize("kind", SETTINGS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_the_sum_of_a_batch_is_what_its_prompts_may_spend_alone(kind, side):
    model, budget = model_of("llava", "sdpa"), SETTINGS[kind]
    batch = zoo.inputs("llava", model, "padded3", padding_side=side)
    with AutoPrune(budget, fleet=Fleet(uneven))(model) as trace, torch.no_grad():
        model(**batch)
    used, allowed = spent(budget, trace.samples)
    assert any(u != a for u, a in zip(used, allowed, strict=True))
    assert trace.samples[0].tokens_per_layer[-1] > trace.samples[1].tokens_per_layer[-1]
    if budget.exact:
        assert sum(used) == sum(allowed)
    else:
        assert 0.98 * sum(allowed) < sum(used) <= sum(allowed)
    assert all(s.schedule == s.tokens_per_layer for s in trace.samples)


@pytest.mark.parametrize("batch", ["padded3", "padded3_text"])
@pytest.mark.parametrize("merger", [None, "dpc_knn"])
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "internvl"])
def test_prompts_of_different_budgets_equal_the_oracle(name, batch, merger):
    model = model_of(name, "sdpa")
    arguments = zoo.inputs(name, model, batch)
    method = AutoPrune(Budget.ratio(0.5, over="batch"), fleet=Fleet(uneven), merger=merger)
    if merger is not None:  # the oracle of a trace knows no merged tokens
        with method(model) as trace:
            model.generate(**arguments, max_new_tokens=2, do_sample=False)
        used, allowed = spent(method.budget, trace.samples)
        assert sum(used) == sum(allowed) and used != allowed
        return
    result = oracle.compare(model, arguments, method, steps=3)
    assert result.worst < TOLERANCE
    used, allowed = spent(method.budget, result.samples)
    assert sum(used) == sum(allowed) and used != allowed


def test_a_batch_of_one_and_prompts_alike_get_what_they_get_alone():
    model = model_of("llava", "sdpa")
    for only in range(3):
        arguments = zoo.inputs("llava", model, "padded3", only=only)
        found = [
            oracle.compare(model, arguments, AutoPrune(Budget.ratio(0.5, over=over)), steps=1)
            for over in ("prompt", "batch")
        ]
        kept = [[k.tolist() for k in r.samples[0].kept] for r in found]
        assert kept[0] == kept[1] and torch.equal(found[0].tokens, found[1].tokens)


def test_more_information_gets_fewer_tokens_than_alone():
    model = model_of("llava", "sdpa")
    arguments = zoo.inputs("llava", model, "padded3")
    samples = {}
    for over in ("prompt", "batch"):
        with AutoPrune(Budget.ratio(0.5, over=over))(model) as trace, torch.no_grad():
            model(**arguments)
        samples[over] = trace.samples
    bits = [s.mutual_information for s in samples["prompt"]]
    gained = [
        sum(shared.tokens_per_layer) - sum(own.tokens_per_layer)
        for own, shared in zip(samples["prompt"], samples["batch"], strict=True)
    ]
    assert gained[bits.index(min(bits))] > 0 > gained[bits.index(max(bits))]


@pytest.mark.parametrize("kind", SETTINGS)
def test_a_stream_is_never_above_what_was_allowed(kind):
    model, fleet = model_of("llava", "sdpa"), Fleet(InformationRule(3.0))
    budget = Budget(SETTINGS[kind].kind, SETTINGS[kind].value, over="stream")
    allowed = used = 0
    for seed in range(4):
        for batch in ("single", "padded3", "padded3_text"):
            arguments = zoo.inputs("llava", model, batch, seed=seed)
            with AutoPrune(budget, fleet=fleet)(model) as trace, torch.no_grad():
                model(**arguments)
            done, own = spent(budget, [s for s in trace.samples if s.num_visual])
            # Sample by sample, in the batch's order.
            for one, its in zip(done, own, strict=True):
                used, allowed = used + one, allowed + its
                assert used <= allowed
            state = fleet.state
            assert (state.allowed, state.spent) == (allowed, used)
            assert state.bank == allowed - used
    assert state.prompts == 4 * (1 + 3 + 2)


def test_beams_get_the_same_and_spend_as_often_as_they_run():
    model = model_of("llava", "sdpa")
    arguments = zoo.inputs("llava", model, "padded3")
    for over in ("batch", "stream"):
        fleet = Fleet(uneven)
        budget = Budget.ratio(0.5, over=over)
        with AutoPrune(budget, fleet=fleet)(model) as trace:
            model.generate(**arguments, max_new_tokens=3, num_beams=2, do_sample=False)
        samples = trace.samples
        assert len(samples) == 6
        schedules = [s.tokens_per_layer for s in samples]
        assert schedules[::2] == schedules[1::2]
        used, allowed = spent(budget, samples)
        assert sum(used) == sum(allowed) if over == "batch" else sum(used) <= sum(allowed)
    assert (fleet.state.prompts, fleet.state.spent) == (6, sum(used))


class Broken(RuntimeError):
    pass


@pytest.mark.parametrize("error", [Broken, KeyboardInterrupt])
@pytest.mark.parametrize("layer", [0, 4])
def test_a_prefill_that_fails_gives_back_what_it_took(layer, error):
    """At layer 0 nothing is booked yet; at layer 4 it is."""
    model, gain, taken = zoo.build("llava", "sdpa"), [1.0], []
    fleet = Fleet(lambda prompts, tokens: [-gain[0] * tokens] * len(prompts))
    method = AutoPrune(Budget.ratio(0.5, over="stream"), fleet=fleet)
    arguments = zoo.inputs("llava", model, "padded3")

    def fail(*_):
        taken.append(fleet.state.bank)
        raise error

    def run_and_fail():
        hook = model.get_decoder().layers[layer].register_forward_hook(fail)
        try:
            with pytest.raises(error):
                model(**arguments)
        finally:
            hook.remove()

    for gain[0] in (1.0, 0.1):
        with method(model), torch.no_grad():
            model(**arguments)
    before, gain[0] = fleet.state, 10.0
    assert before.bank > 0
    with method(model) as trace, torch.no_grad():
        run_and_fail()
        # An interrupt is noticed when the thread's next forward begins, or when the block is left.
        assert fleet.state == before or error is KeyboardInterrupt
        assert (taken[-1] < before.bank) == (layer == 4)
    assert fleet.state == before and not trace.samples
    with method(model) as trace, torch.no_grad():
        run_and_fail()
        model(**arguments)
    state = fleet.state
    assert len(trace.samples) == 3 and state.prompts == before.prompts + 3
    assert state.spent - before.spent == sum(sum(s.tokens_per_layer) for s in trace.samples)
    assert state.bank == state.allowed - state.spent < before.bank


def test_threads_share_a_fleet():
    model, fleet = model_of("llava", "sdpa"), Fleet(InformationRule(2.0))
    method, budget = AutoPrune(Budget.ratio(0.5, over="stream"), fleet=fleet), Budget.ratio(0.5)
    sums, lock = [], threading.Lock()

    def work(seed):
        for turn in range(3):
            with method(model) as trace, torch.no_grad():
                model(**zoo.inputs("llava", model, "padded3", seed=10 * seed + turn))
            used, allowed = spent(budget, trace.samples)
            with lock:
                sums.append((sum(used), sum(allowed)))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    used, allowed = (sum(column) for column in zip(*sums, strict=True))
    assert len(sums) == 9 and used <= allowed
    assert fleet.state == FleetState(27, allowed, used, allowed - used, fleet.state.price)


def test_a_static_cache_has_room_for_whoever_gets_most():
    model = model_of("llava", "sdpa")
    arguments = zoo.inputs("llava", model, "padded3")

    def all_to_the_last(prompts, tokens):
        return [-(10.0**i) * tokens for i in range(len(prompts))]

    method = AutoPrune(Budget.ratio(0.5, over="batch"), fleet=Fleet(all_to_the_last))
    sizes = [16, 16, 32]
    with method(model) as trace:
        expected, tokens = oracle.generate_logits(model, arguments, 3)
    assert [s.num_visual for s in trace.samples] == sizes
    # What is decided before the measurement, and all of it behind.
    for sample in trace.samples:
        room = method.capacity(LAYERS, sample.num_visual)
        assert room == [*sample.tokens_per_layer[:2], *[sample.tokens_per_layer[1]] * (LAYERS - 2)]
    alone = AutoPrune(Budget.ratio(0.5)).capacity(LAYERS, 32)
    assert trace.samples[2].tokens_per_layer[-1] > alone[-1]
    handle = method.attach(model)
    try:
        length = arguments["input_ids"].shape[1]
        cache = handle.static_cache(num_visual=sizes, num_text=length, max_new_tokens=8)
        found, again = oracle.generate_logits(model, arguments, 3, past_key_values=cache)
    finally:
        handle.detach()
    assert torch.equal(again, tokens) and (found - expected).abs().max() < TOLERANCE


def test_methods_side_by_side_share_among_their_own_prompts():
    model = model_of("llava", "sdpa")
    arguments = zoo.inputs("llava", model, "padded3")
    fleet = Fleet()
    shared = AutoPrune(Budget.ratio(0.5, over="batch"), fleet=Fleet(uneven))
    stream = AutoPrune(Budget.ratio(0.5, over="stream"), fleet=fleet)
    with per_prompt([shared, stream, shared])(model) as trace, torch.no_grad():
        model(**arguments)
    used, allowed = spent(shared.budget, trace.samples)
    assert used[0] + used[2] == allowed[0] + allowed[2] and used[0] != allowed[0]
    assert used[1] == allowed[1]
    assert (fleet.state.prompts, fleet.state.spent) == (1, used[1])


# What is refused.


@pytest.mark.parametrize("over", ["batch", "stream"])
@pytest.mark.parametrize("name", [n for n in list_methods() if n != "autoprune"])
def test_other_methods_refuse_by_name(name, over):
    with pytest.raises(ValueError, match=rf"{name} gives every prompt the same budget, got Budget"):
        create(name, Budget.tokens(16, over=over))


def test_a_stream_needs_a_fleet_and_a_fleet_a_stream():
    with pytest.raises(ValueError, match=r"needs a fleet, .* add fleet=Fleet\(\)"):
        AutoPrune(Budget.tokens(4, over="stream"))
    with pytest.raises(
        ValueError, match=r"and Budget\.tokens\(4\) is one of each prompt; add over"
    ):
        AutoPrune(4, fleet=Fleet())
    with pytest.raises(ValueError, match=r"fleet must be an autoprune\.Fleet or None, got 'mine'"):
        AutoPrune(Budget.tokens(4, over="stream"), fleet="mine")
    with pytest.raises(ValueError, match="for the budget of a single prompt, got over='batch'"):
        Budget.tokens(4, counted="leaving", over="batch")
    with pytest.raises(ValueError, match="autoprune_reference gives every prompt the same budget"):
        AutoPruneReference(Budget.tokens(4, over="batch"))


@pytest.mark.parametrize(
    ("answer", "said"), [(float("nan"), "finite losses"), (None, r"here numbers of shape \[3, ")]
)
def test_a_bad_function_is_refused_in_one_sentence(answer, said):
    model = model_of("llava", "sdpa")
    fleet = Fleet(
        lambda prompts, tokens: [[answer] * len(tokens)] * (len(prompts) if answer else 2)
    )
    method = AutoPrune(Budget.ratio(0.5, over="stream"), fleet=fleet)
    with method(model), torch.no_grad(), pytest.raises(ValueError, match=said):
        model(**zoo.inputs("llava", model, "padded3"))
    assert fleet.state == FleetState()
