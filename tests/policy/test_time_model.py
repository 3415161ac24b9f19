"""How many cuts pay for themselves on a device, predicted from three launch times and a rate."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from autoprune import AutoPrune, Budget
from autoprune.contract import ModelShape, Prompts, PromptState
from autoprune.policy.adaptive import Sizes, decide_cut_every
from autoprune.policy.budget import InfeasibleBudget
from autoprune.policy.cost import DecoderCost
from autoprune.policy.time_model import DeviceSpeed, Prefill, choose_cut_every
from tests import zoo
from tests.policy.examples import examples

LLAVA_7B = DecoderCost(32, 4096, 32, 32, 128, 11008)
# As measured on GPUs: a plain prefill of 32 layers is 22 ms of launches, and 31 cuts take 20 to 44 ms more.
GPU = DeviceSpeed(0.0007, 0.0004, 0.0006, 5e14)


def test_the_time_of_a_prefill_worked_out_by_hand():
    speed = DeviceSpeed(
        layer_launch_s=2.0, cut_launch_s=0.5, ranking_launch_s=0.25, flops_per_s=10.0
    )
    # Layers of 100, 30 and 5 FLOPs take 10, 3 and, as the launch is longer, 2 seconds.
    assert Prefill((100, 30, 5)).seconds(speed) == 15
    assert Prefill((100, 30, 5), cuts=2, rankings=4).seconds(speed) == 15 + 1 + 1


@pytest.mark.parametrize("field", ["layer_launch_s", "cut_launch_s", "flops_per_s"])
@pytest.mark.parametrize("value", [-1e-9, float("nan"), float("inf")])
def test_a_speed_that_is_none_is_refused_and_named(field, value):
    with pytest.raises(ValueError, match=f"^{field} must be finite and 0 or more"):
        replace(GPU, **{field: value})
    with pytest.raises(ValueError, match=r"^flops_per_s must be above 0"):
        replace(GPU, flops_per_s=0)


SECOND = DeviceSpeed(0, 1, 0, 1)  # a FLOP and a cut take a second each


@pytest.mark.parametrize(
    ("plain", "times", "chosen"),
    [
        (100, {1: 70, 2: 60, 4: 50}, 4),
        (100, {1: 52.9, 2: 51, 4: 50}, 1),  # 3 % of the plain prefill more than the fastest
        (100, {1: 53.1, 2: 51, 4: 50}, 2),
        (100, {1: 110, 2: 104, 4: 103}, 4),  # 3 % more than the plain model
        (100, {1: 110, 2: 104, 4: 103.1}, None),
        (100, {1: 102, 2: 101, 4: 101}, 1),
    ],
)
def test_the_finest_of_what_is_as_fast_as_the_fastest(plain, times, chosen):
    choices = {every: Prefill((seconds,)) for every, seconds in times.items()}
    assert choose_cut_every(Prefill((plain,)), choices, SECOND).cut_every == chosen


def test_what_must_be_pruned_is_pruned_however_long_it_takes():
    choices = {1: Prefill((300,)), 4: Prefill((200,))}
    assert choose_cut_every(Prefill((100,)), choices, SECOND).cut_every is None
    assert choose_cut_every(Prefill((100,)), choices, SECOND, must_prune=True).cut_every == 4


def test_a_decision_says_why():
    plain = Prefill((0.05,) * 4)
    slow, fast = Prefill((0.06,) * 4), Prefill((0.0301,) * 4)
    assert choose_cut_every(plain, {1: slow}, SECOND).reason == (
        "Nothing is pruned: the prefill is predicted to take 200.0 ms whole, and 240.0 ms or more with cuts."
    )
    for every, what in {
        1: "Cuts in every layer",
        2: "Cuts every 2 layers",
        4: "One cut for all layers behind the measurement",
    }.items():
        assert choose_cut_every(plain, {every: fast}, SECOND).reason == (
            f"{what}: the prefill is predicted to take 120.4 ms so, and 200.0 ms without pruning."
        )


@st.composite
def problems(draw):
    """A plain prefill, and pruned ones that make fewer cuts the coarser they are."""
    flops = st.lists(st.floats(0, 1e12), min_size=4, max_size=4)
    plain = Prefill(tuple(draw(flops)))
    choices = {}
    for every in draw(st.sets(st.sampled_from([1, 2, 4, 8, 16, 32]), min_size=1)) | {1}:
        cuts = -(-32 // every)
        choices[every] = Prefill(tuple(draw(flops)), cuts, cuts + 1)
    second = st.floats(0, 1)
    return plain, choices, DeviceSpeed(draw(second), draw(second), draw(second), 1e12)


@examples(200)
@given(problems())
def test_no_other_choice_is_predicted_faster_by_3_percent_of_the_plain_prefill(problem):
    plain, choices, speed = problem
    chosen = choose_cut_every(plain, choices, speed).cut_every
    others = [plain, *choices.values()]
    taken = plain if chosen is None else choices[chosen]
    fastest = min(other.seconds(speed) for other in others)
    assert taken.seconds(speed) <= fastest + 0.03 * plain.seconds(speed)
    assert taken.seconds(speed) <= 1.03 * plain.seconds(speed)
    if chosen is None:
        assert all(p.seconds(speed) > 1.03 * plain.seconds(speed) for p in choices.values())


@examples(200)
@given(problems())
def test_free_cuts_are_made_everywhere_and_priceless_ones_nowhere(problem):
    plain, choices, speed = problem
    free, dear = (replace(speed, cut_launch_s=s, ranking_launch_s=s) for s in (0, 1e9))
    same = {every: replace(pruned, layer_flops=(1e11,)) for every, pruned in choices.items()}
    assert choose_cut_every(Prefill((1e12,)), same, free).cut_every == 1
    assert choose_cut_every(plain, choices, dear).cut_every is None


@st.composite
def prompts(draw):
    number = draw(st.integers(1, 4))
    visual = tuple(draw(st.lists(st.integers(0, 3000), min_size=number, max_size=number)))
    text = tuple(draw(st.lists(st.integers(1, 200), min_size=number, max_size=number)))
    return Sizes(32, visual, text, LLAVA_7B)


def adaptive(budget, cut_every=1, **options):
    return AutoPrune(budget, cut_every=cut_every, **options)._schedule()


@examples(60)
@given(prompts(), st.floats(0.1, 0.9), st.floats(0, 0.01), st.floats(1e11, 1e15))
def test_free_cuts_of_long_layers_and_priceless_ones(sizes, ratio, launch, rate):
    schedule = adaptive(Budget.ratio(ratio))
    assume(any(sizes.num_visual))
    try:
        free = decide_cut_every(schedule, sizes, DeviceSpeed(0, 0, 0, rate))
    except InfeasibleBudget:
        assume(False)
    # Without launches, what is left of a difference is attention, which is quadratic in the tokens.
    assert free.cut_every == 1
    dear = decide_cut_every(schedule, sizes, DeviceSpeed(launch, 1e9, 1e9, rate))
    assert dear.cut_every is None


@pytest.mark.parametrize(
    ("visual", "budget", "expected"),
    [
        ((576,), 64, None),  # launches alone: 22 ms whole
        ((2880,), 320, 16),
        ((2880,) * 8, 320, 2),
    ],
)
def test_what_a_gpu_is_told_to_do_at_the_sizes_of_llava(visual, budget, expected):
    sizes = Sizes(32, visual, (60,) * len(visual), LLAVA_7B)
    assert decide_cut_every(adaptive(budget), sizes, GPU).cut_every == expected


def test_a_batch_is_decided_by_its_sum():
    small = Sizes(32, (576,), (60,), LLAVA_7B)
    many = Sizes(32, (576,) * 32, (60,) * 32, LLAVA_7B)
    schedule = adaptive(64)
    assert decide_cut_every(schedule, small, GPU).cut_every is None
    assert decide_cut_every(schedule, many, GPU).cut_every == 2


# What AutoPrune makes of it.


def begun(method, speed, visual=(576,), text=(60,), layers=32):
    shape = ModelShape(layers, replace(LLAVA_7B, layers=layers), True, speed=speed)
    state = PromptState(shape, Prompts(visual, text))
    method.begin(state)
    return state


def test_where_pruning_does_not_pay_every_token_stays_and_nothing_is_looked_at():
    method = AutoPrune(64, cut_every="auto")
    state = begun(method, GPU, (576, 100), (60, 60))
    assert state.schedule == [[576] * 32, [100] * 32]
    assert [method.needs(cut, state) for cut in range(32)] == [None] * 32
    assert state.decision.startswith("Nothing is pruned: the prefill is predicted to take")


def test_where_pruning_pays_it_is_as_if_the_number_had_been_given():
    auto, given = (AutoPrune(320, cut_every=every) for every in ("auto", 16))
    found, expected = (begun(method, GPU, (2880,)) for method in (auto, given))
    assert found.decision.startswith("Cuts every 16 layers: the prefill is predicted")
    assert expected.decision is None
    assert found.notes["adaptive"] == expected.notes["adaptive"]
    assert (found.notes["plan"] == expected.notes["plan"]).all()
    needs = [[m.needs(cut, s) for cut in range(32)] for m, s in ((auto, found), (given, expected))]
    assert needs[0] == needs[1]


def test_without_a_speed_cuts_are_made_in_every_layer():
    state = begun(AutoPrune(64, cut_every="auto"), None)
    assert state.notes["adaptive"].cut_every == 1
    assert state.decision == ("Cuts in every layer: the speed of this device was not measured.")


def test_a_budget_of_bytes_is_kept_even_where_pruning_takes_longer():
    budget = Budget.kv_bytes(32 * (60 + 64) * LLAVA_7B.kv_bytes_per_token)
    state = begun(AutoPrune(budget, cut_every="auto"), GPU)
    assert state.notes["adaptive"].cut_every > 1
    assert state.notes["plan"].sum() == 32 * 64


def test_a_budget_that_cannot_be_met_is_refused_all_the_same():
    for speed in (None, GPU):
        with pytest.raises(InfeasibleBudget):
            begun(AutoPrune(4, cut_every="auto"), speed)
    with pytest.raises(InfeasibleBudget):
        AutoPrune(4, cut_every="auto").capacity(32, 576)


def test_a_cache_has_room_for_every_decision():
    assert AutoPrune(64, cut_every="auto").capacity(32, 576) == [576] * 32
    budget = Budget.kv_bytes(32 * (60 + 64) * LLAVA_7B.kv_bytes_per_token)
    room = AutoPrune(budget, cut_every="auto").capacity(32, 576, 60, LLAVA_7B)
    for every in (1, 2, 4, 8, 16, 32):
        for bits in (0.0, 0.8, 3.0):
            plan = AutoPrune(budget, cut_every=every).plan(32, 576, bits, 60, LLAVA_7B)
            assert all(n <= most for n, most in zip(plan, room, strict=True))
    assert room[-1] < 576


@pytest.mark.parametrize("value", ["often", 0, 2.5, True, None])
def test_other_numbers_of_layers_are_refused(value):
    with pytest.raises(
        ValueError, match=r'cut_every must be a whole number of layers, .* or "auto"'
    ):
        AutoPrune(64, cut_every=value)


@dataclass(frozen=True)
class OnADevice(AutoPrune):
    """AutoPrune on a device of a given speed."""

    speed: DeviceSpeed | None = None

    def begin(self, state):
        state.shape = replace(state.shape, speed=self.speed)
        super().begin(state)


@torch.inference_mode()
def test_a_model_is_left_alone_or_pruned_as_decided():
    model = zoo.build("llava", "sdpa")
    inputs = zoo.inputs("llava", model, "padded3")
    plain = model(**inputs).logits
    budget = Budget.ratio(0.5)
    with OnADevice(budget, cut_every="auto", speed=DeviceSpeed(1, 1, 1, 1e15))(model) as trace:
        assert torch.equal(model(**inputs).logits, plain)
    for sample in trace.samples:
        assert sample.tokens_per_layer == sample.schedule == [sample.num_visual] * zoo.LAYERS
        assert sample.mutual_information is None
    with OnADevice(budget, cut_every="auto", speed=DeviceSpeed(0, 1e-9, 0, 1))(model) as trace:
        every_layer = model(**inputs).logits
    with AutoPrune(budget)(model) as expected:
        assert torch.equal(model(**inputs).logits, every_layer)
    assert not torch.equal(every_layer, plain)
    assert [s.kept[-1].tolist() for s in trace.samples] == [
        s.kept[-1].tolist() for s in expected.samples
    ]


def test_the_measurement_counts_where_nothing_is_cut():
    sizes = Sizes(32, (576,), (60,), LLAVA_7B)
    dear = DeviceSpeed(0, 0, 1e9, 1e12)
    assert decide_cut_every(adaptive(Budget.ratio(1)), sizes, dear).cut_every is None
