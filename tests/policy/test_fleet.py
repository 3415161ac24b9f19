"""Budgets over a batch and over a stream: sums exact, never overdrawn, in any order and in threads."""

from __future__ import annotations

import json
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from autoprune import Budget, DecoderCost, Fleet
from autoprune.policy.adaptive import AdaptiveSchedule, Sizes, decide_cut_every
from autoprune.policy.budget import InfeasibleBudget
from autoprune.policy.demand import Demand, plan_batch
from autoprune.policy.fleet import FleetState
from autoprune.policy.rules import CalibratedRule, InformationRule, Signals
from autoprune.policy.time_model import DeviceSpeed
from tests.policy.examples import examples

LAYERS = 8
COST = DecoderCost(LAYERS, hidden=32, heads=4, kv_heads=2, head_dim=8, intermediate=64)


def schedule(budget, **settings):
    chosen = {"mi_layer": 1, "prior": "curve", "cut_every": 1, "layer_0_is_full": True} | settings
    return AdaptiveSchedule(budget, 0.4, 0.3, 15.0, 0.3, "logistic", **chosen)


def demand(budget, visual, information, text=None, copies=1, **settings):
    sizes = Sizes(LAYERS, tuple(visual), tuple(text or [10] * len(visual)), COST)
    how = schedule(budget, **settings)
    own = how.before_measuring(sizes)[:, how.mi_layer + 1 :].mean(axis=1).tolist()
    signals = [
        Signals(bits, 1 + 5 * bits, bits, *rest)
        for bits, *rest in zip(information, visual, sizes.num_text, own, strict=True)
    ]
    return Demand.of(how, sizes, information, signals, copies)


def check_feasible(plan, prompts):
    """Every schedule is one that the engine can run, and follows its prior up to the measurement."""
    visual = np.array(prompts.sizes.num_visual)
    assert (np.diff(np.column_stack((visual, plan)), axis=1) <= 0).all()
    assert (plan >= 1).all()
    before = prompts.schedule.before_measuring(prompts.sizes)
    decided = prompts.schedule.mi_layer + 1
    assert (plan[:, :decided] == before[:, :decided]).all()


budgets = st.one_of(
    st.builds(Budget.tokens, st.floats(1, 80)),
    st.builds(Budget.ratio, st.floats(0.15, 1)),
    st.builds(Budget.flops, st.floats(0.2, 1)),
    st.builds(Budget.kv_bytes, st.integers(8_000, 400_000)),
)


@st.composite
def demands(draw, kinds=budgets, over="batch", most=5):
    """Prompts of mixed sizes whose budget is feasible."""
    number = draw(st.integers(1, most))
    visual = draw(st.lists(st.integers(1, 90), min_size=number, max_size=number))
    text = draw(st.lists(st.integers(1, 60), min_size=number, max_size=number))
    bits = draw(st.lists(st.floats(0, 4), min_size=number, max_size=number))
    settings = {"cut_every": draw(st.sampled_from([1, 3])), "layer_0_is_full": draw(st.booleans())}
    if not settings["layer_0_is_full"]:
        settings["mi_layer"] = draw(st.sampled_from([1, -1]))
    try:
        budget = replace(draw(kinds), over=over)
        return demand(budget, visual, bits, text, draw(st.integers(1, 3)), **settings)
    except InfeasibleBudget:
        assume(False)


rules = st.sampled_from(
    [
        InformationRule(),
        InformationRule(3.0),
        lambda prompts, tokens: [[-s.num_text * np.sqrt(t) for t in tokens] for s in prompts],
        lambda prompts, tokens: np.sin(np.outer(range(len(prompts)), tokens)),
        lambda prompts, tokens: np.zeros((len(prompts), len(tokens))),
    ]
)


@examples(150)
@given(demands(), rules)
def test_a_batch_spends_what_its_prompts_may_spend_alone(prompts, rule):
    plan = plan_batch(prompts, rule)
    check_feasible(plan, prompts)
    rest = int(prompts.allowed.sum() - prompts.spent(plan).sum())
    if prompts.schedule.budget.exact:
        assert rest == 0
        return
    # Nothing of what is left pays for a token in any layer behind the measurement.
    assert rest >= 0
    if prompts.schedule.cut_every > 1 and prompts.schedule.budget.kind == "kv_bytes":
        return  # counts are levelled within groups of layers
    for row in range(len(plan)):
        for layer in range(2, LAYERS):
            if plan[row, layer] < plan[row, layer - 1]:
                more = plan.copy()
                more[row, layer] += 1
                assert prompts.spent(more).sum() - prompts.spent(plan).sum() > rest


def test_shares_of_a_batch_worked_out_by_hand():
    # 8 layers of 16 of 64 tokens each, 256 tokens in all. Of what the first two layers leave, twice the
    # information wants half, but for the line between two candidates.
    prompts = demand(Budget.tokens(16, over="batch"), [64, 64], [1.0, 2.0])
    decided = prompts.schedule.before_measuring(prompts.sizes)[0, :2].sum()
    shares = prompts.spent(plan_batch(prompts, InformationRule()))
    assert shares.sum() == 256
    assert shares[0] - decided == pytest.approx((256 - 2 * decided) * 2 / 3, rel=0.05)
    # Three prompts of one information: what each gets alone.
    alike = demand(Budget.tokens(16, over="batch"), [64] * 3, [1.3] * 3)
    assert (prompts.spent(plan_batch(alike, InformationRule())) == 128).all()
    assert (plan_batch(alike, InformationRule()) == alike.solve(alike.allowed)).all()


def test_a_share_of_the_tokens_is_of_each_prompts_own():
    prompts = demand(Budget.ratio(0.25, over="batch"), [40, 80], [1.0, 1.0])
    assert prompts.spent(plan_batch(prompts, InformationRule())).tolist() == [80, 160]


def test_a_prompt_that_needs_no_more_leaves_its_part_to_the_others():
    def needs(prompts, tokens):
        return [-np.minimum(2 * tokens, 16) if s.num_text == 1 else -tokens for s in prompts]

    budget = Budget.tokens(16, over="batch")
    prompts = demand(budget, [64, 64], [1.0, 1.0], text=[1, 2], layer_0_is_full=False)
    decided = prompts.schedule.before_measuring(prompts.sizes)[0, :2].sum()
    first = decided + 6 * 8
    assert prompts.spent(plan_batch(prompts, needs)).tolist() == [first, 256 - first]


@examples(60)
@given(demands(most=1))
def test_a_batch_of_one_is_its_prompt_alone(prompts):
    own = replace(prompts.schedule.budget, over="prompt")
    alone = replace(prompts.schedule, budget=own)
    expected = alone.after_measuring(prompts.sizes, prompts.information)
    assert (plan_batch(prompts, InformationRule()) == expected).all()


@examples(100)
@given(
    st.lists(st.floats(0, 4), min_size=2, max_size=8),
    st.floats(10, 60),
    st.sampled_from([0.5, 1.0, 3.0]),
    st.sampled_from(["batch", "stream"]),
)
def test_more_information_never_gets_more_tokens(bits, mean, power, over):
    bits = sorted(bits)
    if over == "batch":
        prompts = demand(Budget.tokens(mean, over="batch"), [64] * len(bits), bits)
        spent = prompts.spent(plan_batch(prompts, InformationRule(power)))
    else:  # each at the same price and bank
        fleet, spent = Fleet(InformationRule(power)), []
        for start in (2.0, 1.0, 3.0):
            run(fleet, demand(Budget.tokens(mean, over="stream"), [64], [start]))
        for own in bits:
            prompts = demand(Budget.tokens(mean, over="stream"), [64], [own])
            plan, booking = fleet.plan(prompts)
            fleet.settle(booking, done=False)
            spent.append(int(prompts.spent(plan)[0]))
    assert (np.diff(spent) <= 0).all()


@examples(60)
@given(demands(), st.randoms())
def test_the_order_of_a_batch_does_not_matter(prompts, random):
    # But for which of two equal remainders is rounded up.
    order = list(range(len(prompts.allowed)))
    random.shuffle(order)
    sizes = prompts.sizes
    moved = demand(
        prompts.schedule.budget,
        [sizes.num_visual[i] for i in order],
        [prompts.information[i] for i in order],
        [sizes.num_text[i] for i in order],
        cut_every=prompts.schedule.cut_every,
        layer_0_is_full=prompts.schedule.layer_0_is_full,
    )
    one, other = (plan_batch(p, InformationRule()) for p in (prompts, moved))
    if prompts.schedule.budget.exact:
        assert np.abs(prompts.spent(one)[order] - moved.spent(other)).max() <= 1
    assert moved.spent(other).sum() <= prompts.allowed.sum()


def test_a_shared_budget_is_kept_where_pruning_does_not_pay():
    sizes, slow = Sizes(LAYERS, (64,), (10,), COST), DeviceSpeed(0, 1.0, 1.0, 1e12)
    for over, cuts in (("prompt", None), ("batch", 8), ("stream", 8)):
        how = schedule(Budget.tokens(16, over=over))
        assert decide_cut_every(how, sizes, slow).cut_every == cuts


# A stream.


def run(fleet, prompts, done=True):
    plan, booking = fleet.plan(prompts)
    fleet.settle(booking, done)
    return plan


@st.composite
def streams(draw):
    """Batches of one budget, in any order."""
    budget = replace(draw(budgets), over="stream")
    return draw(st.lists(demands(st.just(budget), "stream", 3), min_size=1, max_size=6))


@examples(100)
@given(streams(), rules, st.lists(st.booleans(), min_size=6, max_size=6))
def test_a_stream_is_never_above_what_was_allowed(batches, rule, done):
    fleet, allowed, spent = Fleet(rule), 0, 0
    for prompts, succeeds in zip(batches, done, strict=False):
        before = fleet.state
        plan, booking = fleet.plan(prompts)
        check_feasible(plan, prompts)
        # Prompt by prompt, inside of a batch, too.
        own, cost = prompts.allowed.tolist(), prompts.spent(plan).tolist()
        within = np.cumsum([prompts.copies * (a - s) for a, s in zip(own, cost, strict=True)])
        assert (before.bank + within >= 0).all()
        assert 0 <= fleet.state.bank <= before.bank
        fleet.settle(booking, succeeds)
        if not succeeds:
            assert fleet.state == before
            continue
        allowed += prompts.copies * sum(own)
        spent += prompts.copies * sum(cost)
        state = fleet.state
        assert (state.allowed, state.spent, state.bank) == (allowed, spent, allowed - spent)
        assert spent <= allowed and 1 / 8 <= state.price <= 8


def test_a_stream_of_equal_prompts_gets_equally_much():
    fleet = Fleet()
    for _ in range(20):
        prompts = demand(Budget.tokens(16, over="stream"), [64], [1.7])
        assert prompts.spent(run(fleet, prompts)).tolist() == [128]
    assert fleet.state == FleetState(20, 20 * 128, 20 * 128, 0, 1.0)


def test_the_price_and_the_bank_worked_out_by_hand():
    def straight(prompts, tokens):
        """A token saves .02 of loss for each bit, up to 40 tokens a layer."""
        return [-0.02 * s.information * np.minimum(tokens, 32) for s in prompts]

    def one(bits):
        return demand(Budget.tokens(16, over="stream"), [64], [bits], layer_0_is_full=False)

    fleet = Fleet(straight)
    least = int(one(1.0).schedule.range_after_measuring(one(1.0).sizes)[0][0])
    most = 32 * 8
    assert least < 128 < most
    # At its own price: its own allowance.
    assert one(1).spent(run(fleet, one(1.0))).tolist() == [128]
    # The mean price is 0.75 of the first prompt's by now: half the gain is not worth it.
    assert one(1).spent(run(fleet, one(0.5))).tolist() == [least]
    saved = 128 - least
    assert fleet.state.bank == saved
    assert fleet.state.price == pytest.approx(np.exp(-0.1 * saved / 128))
    # Worth more than the mean: all that there is, up to where more saves nothing.
    assert one(1).spent(run(fleet, one(4.0))).tolist() == [min(128 + saved, most)]
    assert fleet.state.bank == max(128 + saved - most, 0)


def convex(prompts, tokens):
    """Loss falls by half with every few tokens: the fewer, the more information there is."""
    return [np.exp2(-tokens * max(s.information, 0.1) / 16) for s in prompts]


def loss_of(prompts, plan):
    """What that rule says of a plan's open layers."""
    mean = plan[:, prompts.schedule.mi_layer + 1 :].mean(axis=1)
    return float(np.mean([convex([s], m)[0] for s, m in zip(prompts.signals, mean, strict=True)]))


@pytest.mark.parametrize("order", ["mixed", "easy last", "easy first"])
def test_a_short_stream_spends_nearly_all_and_loses_no_more_than_alone(order):
    bits = np.random.default_rng(1).uniform(0.2, 4.0, 300)
    if order != "mixed":
        bits = np.sort(bits)[:: 1 if order == "easy last" else -1]
    fleet, lost, alone = Fleet(convex), [], []
    for own in bits:
        prompts = demand(
            Budget.tokens(16, over="stream"), [64], [own], layer_0_is_full=False, mi_layer=-1
        )
        lost.append(loss_of(prompts, run(fleet, prompts)))
        alone.append(loss_of(prompts, prompts.solve(prompts.allowed)))
    assert 0.97 < fleet.state.spent / fleet.state.allowed <= 1
    # In order of difficulty nothing is to be gained: what is saved comes too late, or is missed.
    assert np.mean(lost) <= (0.985 if order == "mixed" else 1.03) * np.mean(alone)


@examples(50)
@given(st.lists(st.floats(0.2, 4.0), min_size=1, max_size=12))
def test_a_batch_in_a_stream_gets_what_its_prompts_get_one_by_one(bits):
    budget, settings = Budget.tokens(16, over="stream"), {"layer_0_is_full": False, "mi_layer": -1}
    together, one_by_one = Fleet(convex), Fleet(convex)
    plan = run(together, demand(budget, [64] * len(bits), bits, **settings))
    rows = [run(one_by_one, demand(budget, [64], [own], **settings))[0] for own in bits]
    assert plan.tolist() == [row.tolist() for row in rows]
    assert together.state.price == pytest.approx(one_by_one.state.price)


def test_a_hard_prompt_after_easy_ones_gets_what_they_saved():
    fleet, spent = Fleet(), []
    for bits in [1.0, 3.0, 3.0, 3.0, 0.3, 1.0]:
        prompts = demand(Budget.tokens(16, over="stream"), [64], [bits])
        spent += prompts.spent(run(fleet, prompts)).tolist()
    assert spent[0] == 128 and max(spent[1:4]) < 128 < spent[4]
    assert sum(spent) <= 6 * 128


def test_what_a_prompt_holds_is_not_there_for_another():
    def straight(prompts, tokens):
        """A token saves the more loss the less information there is, however many there are."""
        return [-tokens / s.information for s in prompts]

    fleet = Fleet(straight)
    for bits in (1.0, 3.0):
        run(fleet, demand(Budget.tokens(16, over="stream"), [64], [bits]))
    bank = fleet.state.bank
    hard = demand(Budget.tokens(16, over="stream"), [64], [0.1])
    plan, first = fleet.plan(hard)
    assert bank > 0 and hard.spent(plan)[0] == 128 + bank and fleet.state.bank == 0
    second, booking = fleet.plan(hard)
    assert hard.spent(second)[0] == 128
    fleet.settle(first, done=False)
    assert fleet.state.bank == bank
    fleet.settle(booking, done=True)
    assert fleet.state.bank == bank


def test_savings_are_there_when_their_prefill_is_done():
    fleet = Fleet()
    run(fleet, demand(Budget.tokens(16, over="stream"), [64], [1.0]))
    _, easy = fleet.plan(demand(Budget.tokens(16, over="stream"), [64], [4.0]))
    assert fleet.state.bank == 0
    fleet.settle(easy, done=True)
    assert fleet.state.bank > 0


def test_copies_spend_as_often_as_they_run():
    fleet = Fleet()
    run(fleet, demand(Budget.tokens(16, over="stream"), [64], [1.0]))
    run(fleet, demand(Budget.tokens(16, over="stream"), [64], [4.0]))
    bank = fleet.state.bank
    hard = demand(Budget.tokens(16, over="stream"), [64], [0.1], copies=3)
    assert hard.spent(run(fleet, hard)).tolist() == [128 + bank // 3]
    assert fleet.state.bank == bank % 3 and fleet.state.prompts == 5


def test_threads_never_overdraw():
    fleet, seen, lock = Fleet(), [], threading.Lock()

    def work(seed):
        random = np.random.default_rng(seed)
        for _ in range(40):
            bits = random.uniform(0.05, 4, 2).tolist()
            prompts = demand(Budget.tokens(14, over="stream"), [64, 30], bits)
            plan, booking = fleet.plan(prompts)
            assert fleet.state.bank >= 0
            done = bool(random.integers(4))
            fleet.settle(booking, done)
            if done:
                with lock:
                    seen.append((prompts.allowed.sum(), prompts.spent(plan).sum()))
            state = fleet.state
            assert 0 <= state.bank <= state.allowed - state.spent

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(work, range(6)))
    allowed, spent = np.sum(seen, axis=0)
    state = fleet.state
    assert (state.allowed, state.spent, state.bank) == (allowed, spent, allowed - spent)
    assert state.prompts == 2 * len(seen)
    assert 0.8 * allowed < spent <= allowed


def test_a_shuffled_stream_spends_nearly_all_and_by_information():
    random, fleet, spent = np.random.default_rng(0), Fleet(), []
    bits = np.exp(0.5 * random.standard_normal(600)).tolist()
    for own in bits:
        prompts = demand(Budget.tokens(16, over="stream"), [64], [own])
        spent += prompts.spent(run(fleet, prompts)).tolist()
    assert 0.97 < np.mean(spent) / 128 <= 1
    assert np.corrcoef(np.argsort(np.argsort(bits)), np.argsort(np.argsort(spent)))[0, 1] < -0.9


def test_a_failing_rule_leaves_nothing_behind():
    def broken(prompts, tokens):
        return np.full((len(prompts), len(tokens)), np.nan)

    fleet = Fleet(broken)
    with pytest.raises(ValueError, match="finite losses"):
        fleet.plan(demand(Budget.tokens(16, over="stream"), [64], [1.0]))
    assert fleet.state == FleetState()


def test_a_fleet_serves_one_budget_on_one_model():
    fleet = Fleet()
    run(fleet, demand(Budget.tokens(16, over="stream"), [64], [1.0]))
    with pytest.raises(
        ValueError, match=r"serves Budget\.tokens\(16, over=\"stream\"\) on a model of 8"
    ):
        fleet.plan(demand(Budget.tokens(17, over="stream"), [64], [1.0]))


@pytest.mark.parametrize("rule", ["entropy", None, 3, ["information"]])
def test_rules_that_are_none_are_refused(rule):
    with pytest.raises(
        ValueError, match='rule must be "information", a CalibratedRule or a function'
    ):
        Fleet(rule)


# Saved and restored.

CALIBRATED = CalibratedRule((8.0, 32.0), (0.0,) * 5, (1.0,) * 5, ((1.0,) * 6, (-1.0,) * 6))


@pytest.mark.parametrize("rule", ["information", InformationRule(2.0), CALIBRATED])
def test_a_stream_goes_on_where_it_was_saved(tmp_path, rule):
    def stream(fleet, seed):
        for bits in np.random.default_rng(seed).uniform(0.2, 3, 20):
            run(fleet, demand(Budget.tokens(16, over="stream"), [64], [float(bits)]))
        return fleet.state

    fleet = Fleet(rule)
    stream(fleet, 0)
    fleet.save(tmp_path / "fleet.json")
    again, copy = Fleet.load(tmp_path / "fleet.json"), pickle.loads(pickle.dumps(fleet))
    assert again.state == fleet.state == copy.state and repr(again) == repr(fleet)
    assert stream(again, 1) == stream(fleet, 1) == stream(copy, 1)
    with pytest.raises(ValueError, match="serves Budget"):
        again.plan(demand(Budget.tokens(17, over="stream"), [64], [1.0]))


def test_a_new_fleet_can_be_saved_too(tmp_path):
    Fleet().save(tmp_path / "new.json")
    assert Fleet.load(tmp_path / "new.json").state == FleetState()


def test_a_function_is_passed_again(tmp_path):
    def mine(prompts, tokens):
        return np.zeros((len(prompts), len(tokens)))

    Fleet(mine).save(tmp_path / "fleet.json")
    with pytest.raises(ValueError, match=r"cannot hold; pass it: Fleet\.load\(path, rule="):
        Fleet.load(tmp_path / "fleet.json")
    assert Fleet.load(tmp_path / "fleet.json", rule=mine).rule is mine
    assert repr(Fleet(mine)) == "Fleet(rule=mine)"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"bank": -5}, "has bank -5, which must be a whole number from 0 on"),
        ({"bank": 10**6}, "has a bank of 1000000, but its prompts have left"),
        ({"bank": 1.5}, "has bank 1.5"),
        ({"price": float("nan")}, "has price nan"),
        ({"price": 0}, "has price 0"),
        ({"price_sum": None}, "has price_sum None"),
        ({"prompts": True}, "has prompts True"),
        ({"autoprune_fleet": 2}, "is a fleet of version 2, and version 1 is what can be read"),
        ({"budget": "16"}, "no budget that can be read: '16'"),
        ({"budget": ["tokens", -3]}, "finite number above 0, got -3"),
        ({"rule": {"kind": "other"}}, "kind information or calibrated, got 'other'"),
    ],
)
def test_files_that_no_fleet_has_written_are_refused(tmp_path, change, said):
    fleet = Fleet()
    run(fleet, demand(Budget.tokens(16, over="stream"), [64], [1.0]))
    fleet.save(path := tmp_path / "fleet.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=said):
        Fleet.load(path)


@pytest.mark.parametrize("text", ["", "[]", "{}", "\x00", '"fleet"'])
def test_other_files_are_refused(tmp_path, text):
    (tmp_path / "other").write_text(text)
    with pytest.raises(ValueError, match=r"other' is no fleet; give a file that Fleet\.save has"):
        Fleet.load(tmp_path / "other")
    with pytest.raises(ValueError, match=r"cannot read the fleet .*missing"):
        Fleet.load(tmp_path / "missing")
