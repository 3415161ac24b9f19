"""Budget: what it accepts, what it refuses, and how it reads."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest

from autoprune.policy.budget import Budget
from autoprune.policy.cost import DecoderCost


@pytest.mark.parametrize("make", [Budget.tokens, Budget.ratio, Budget.flops, Budget.kv_bytes])
@pytest.mark.parametrize("value", [0, -1, -0.5, float("nan"), float("inf"), -float("inf")])
def test_refuses_values_that_are_no_amount(make, value):
    with pytest.raises(ValueError, match=r"Budget\.\w+ expects a finite number above 0, got"):
        make(value)


@pytest.mark.parametrize("make", [Budget.tokens, Budget.ratio, Budget.flops, Budget.kv_bytes])
@pytest.mark.parametrize("value", [True, "64", None, [64], np.bool_(True), 1j])
def test_refuses_other_types(make, value):
    with pytest.raises(ValueError, match="expects a number, got"):
        make(value)


@pytest.mark.parametrize("make", [Budget.ratio, Budget.flops])
def test_shares_end_at_one(make):
    assert make(1).value == 1
    with pytest.raises(ValueError, match=r"expects a share in \(0, 1\], got 1.01"):
        make(1.01)


def test_bytes_are_whole():
    assert Budget.kv_bytes(4e7) == Budget.kv_bytes(40_000_000)
    assert isinstance(Budget.kv_bytes(4e7).value, int)
    with pytest.raises(ValueError, match="whole number of bytes"):
        Budget.kv_bytes(1.5)


def test_huge_numbers_are_refused_not_overflowed():
    with pytest.raises(ValueError, match="finite number"):
        Budget.tokens(10**400)


def test_numpy_and_fractions_are_numbers():
    assert Budget.tokens(np.int64(64)) == Budget.tokens(np.float32(64)) == Budget.tokens(64)
    assert Budget.ratio(Fraction(1, 4)) == Budget.ratio(0.25)


def test_of_reads_a_number_as_tokens_and_passes_budgets_through():
    budget = Budget.flops(0.25)
    assert Budget.of(budget) is budget
    assert Budget.of(64) == Budget.tokens(64)
    with pytest.raises(ValueError, match="expects a number"):
        Budget.of("64")


def test_kind_and_counting_are_checked():
    assert Budget.tokens(64, counted="leaving").counted == "leaving"
    with pytest.raises(ValueError, match='counted must be "entering" or "leaving"'):
        Budget.tokens(64, counted="inside")
    with pytest.raises(ValueError, match=r"applies to Budget\.tokens only"):
        Budget("flops", 0.5, "leaving")
    with pytest.raises(ValueError, match="kind must be"):
        Budget("seconds", 1)


def test_is_a_value():
    assert Budget.tokens(64) == Budget.tokens(64.0)
    assert len({Budget.tokens(64), Budget.tokens(64.0), Budget.tokens(64, counted="leaving")}) == 2
    with pytest.raises(AttributeError):
        Budget.tokens(64).value = 3


def test_reads_well():
    assert str(Budget.tokens(64)) == "64 visual tokens per layer (mean entering)"
    assert str(Budget.tokens(64, counted="leaving")) == "64 visual tokens per layer (mean leaving)"
    assert str(Budget.ratio(0.11)) == "11 % of the visual tokens"
    assert str(Budget.flops(0.25)) == "25 % of the prefill FLOPs"
    assert str(Budget.kv_bytes(40_000_000)) == "40,000,000 bytes of KV cache"
    for budget in (
        Budget.tokens(64.25, counted="leaving"),
        Budget.ratio(0.11),
        Budget.kv_bytes(40_000_000),
    ):
        assert eval(budget.expression, {"Budget": Budget}) == budget


# What a budget allows, what a schedule spends of it, and the smallest that pays for a schedule.

# 2 x 8 x 4 (2 + 1) x 2 + 3 x 8 x 16 x 2 FLOPs a token, 4 x 2 x 4 a pair; 2 x 4 x 2 bytes of keys and values.
SMALL = DecoderCost(layers=3, hidden=8, heads=2, kv_heads=1, head_dim=4, intermediate=16)
TOKEN, PAIR, BYTES = 1152, 32, 16


def flops(*tokens):
    return sum(TOKEN * n + PAIR * n * n for n in tokens)


@pytest.mark.parametrize(
    ("budget", "allowed"),
    [
        (Budget.tokens(4), 12),
        (Budget.tokens(4.1), 12),  # 12.3
        (Budget.tokens(4.2), 13),  # 12.6: above what was asked
        (Budget.tokens(3.5), 10),  # 10.5: to the even number
        (Budget.tokens(4.5), 14),  # 13.5: to the even number, too
        (Budget.tokens(4.5, counted="leaving"), 14),
        (Budget.tokens(1e300), 30),
        (Budget.ratio(0.57), 17),  # 17.1
        (Budget.ratio(0.55), 16),  # 16.5
        (Budget.ratio(1), 30),
        (Budget.kv_bytes(500), 500),
        (Budget.kv_bytes(10**30), 3 * (10 + 2) * BYTES),
        (Budget.flops(0.3), int(0.3 * flops(12, 12, 12))),
        (Budget.flops(1), flops(12, 12, 12)),
    ],
    ids=str,
)
def test_what_is_allowed_worked_out_by_hand(budget, allowed):
    found = budget.allowed(3, 10, 2, SMALL)
    assert (found, type(found)) == (allowed, int)
    rows = budget.allowed(3, np.array([10, 0]), np.array([2, 2]), SMALL)
    assert rows[0] == allowed and rows.dtype == np.int64
    empty = {"flops": budget.value * flops(2, 2, 2), "kv_bytes": min(budget.value, 6 * BYTES)}
    assert rows[1] == int(empty.get(budget.kind, 0))


def test_half_a_token_above_what_was_asked_is_the_most():
    assert Budget.tokens(1.02).allowed(32, 576) == 33  # 32.64
    for mean in np.linspace(1, 40, 1000):
        allowed = Budget.tokens(mean).allowed(32, 576)
        assert allowed == round(32 * mean) and abs(allowed - 32 * mean) <= 0.5


@pytest.mark.parametrize(
    ("budget", "spent"),
    [
        (Budget.tokens(1), 10 + 5 + 3),
        (Budget.tokens(1, counted="leaving"), 5 + 3 + 3),
        (Budget.ratio(1), 10 + 5 + 3),
        (Budget.kv_bytes(1), (12 + 7 + 5) * BYTES),
        (Budget.flops(1), flops(12, 7, 5)),
    ],
    ids=str,
)
def test_what_a_schedule_spends_worked_out_by_hand(budget, spent):
    found = budget.spent([10, 5, 3], 2, SMALL)
    assert (found, type(found)) == (spent, int)
    assert budget.spent([[10, 5, 3], [0, 0, 0]], [2, 0], SMALL).tolist() == [spent, 0]


@pytest.mark.parametrize(
    ("asked", "smallest"),
    [
        (Budget.tokens(1), Budget.tokens(6)),
        (Budget.tokens(1, counted="leaving"), Budget.tokens(3.6667, counted="leaving")),
        (Budget.ratio(1), Budget.ratio(0.6)),
        (Budget.kv_bytes(1), Budget.kv_bytes((12 + 7 + 5) * BYTES)),
        # 34,624 / 55,296 = .626157407...
        (Budget.flops(1), Budget.flops(0.62615741)),
    ],
    ids=str,
)
def test_the_smallest_budget_that_pays_worked_out_by_hand(asked, smallest):
    assert flops(12, 7, 5) == 34_624 and flops(12, 12, 12) == 55_296
    assert asked.smallest_for([10, 5, 3], 10, 2, SMALL) == smallest
    # The dearer of two prompts decides.
    both = asked.smallest_for([[10, 5, 3], [1, 1, 1]], [10, 10], 2, SMALL)
    assert both == smallest
    assert smallest.allowed(3, 10, 2, SMALL) >= smallest.spent([10, 5, 3], 2, SMALL)


def test_the_smallest_share_of_flops_is_allowed_after_rounding_down():
    tiny = DecoderCost(layers=2, hidden=2, heads=1, kv_heads=1, head_dim=2, intermediate=2)
    needed, full = tiny.prefill_flops([25, 6]), tiny.prefill_flops([25, 25])
    # .54875 of 12,800 is 7024, but not in floating point.
    assert (needed, full, int(0.54875 * full)) == (7024, 12800, 7023)
    smallest = Budget.flops(1).smallest_for([25, 6], 25, 0, tiny)
    assert smallest == Budget.flops(0.54875001)
    assert smallest.allowed(2, 25, 0, tiny) == needed


def test_flops_and_bytes_need_the_cost_of_this_decoder():
    for budget in (Budget.flops(0.5), Budget.kv_bytes(100)):
        for ask in (lambda b, c: b.allowed(4, 10, 0, c), lambda b, c: b.spent([1] * 4, 0, c)):
            with pytest.raises(ValueError, match=r"pass cost=DecoderCost\.from_config"):
                ask(budget, None)
            with pytest.raises(ValueError, match="describes 3 layers, but the schedule has 4"):
                ask(budget, SMALL)


def test_all_flops_are_all_flops_beyond_double_precision():
    large = DecoderCost(5, 8193, 65, 1, 15, 29001)
    full = large.prefill_flops([1_000_001] * 5)
    assert full > 2**53 and int(float(full)) < full
    assert Budget.flops(1).allowed(5, 1_000_001, 0, large) == full


def test_no_budget_is_too_small_for_no_tokens_and_none_is_zero():
    assert Budget.tokens(1).smallest_for([0, 0, 0], 10) == Budget.tokens(0.3334)
    assert Budget.ratio(1).smallest_for([0, 0, 0], 10) == Budget.ratio(0.03333334)


# Over which prompts it is spent.


@pytest.mark.parametrize("over", ["batch", "stream"])
@pytest.mark.parametrize(
    "budget",
    [Budget.tokens(4), Budget.ratio(0.5), Budget.flops(0.5), Budget.kv_bytes(500)],
    ids=str,
)
def test_a_budget_over_prompts_allows_each_what_it_may_spend_alone(budget, over):
    shared = getattr(Budget, budget.kind)(budget.value, over=over)
    assert shared != budget and shared.over == over and budget.over == "prompt"
    assert shared.allowed(3, 10, 2, SMALL) == budget.allowed(3, 10, 2, SMALL)
    assert shared.spent([10, 5, 3], 2, SMALL) == budget.spent([10, 5, 3], 2, SMALL)
    smallest = shared.smallest_for([10, 5, 3], 10, 2, SMALL)
    assert smallest.over == over
    assert smallest.value == budget.smallest_for([10, 5, 3], 10, 2, SMALL).value
    assert str(shared) == f"{budget}, mean over the {over}"
    assert eval(shared.expression, {"Budget": Budget}) == shared
    assert Budget.of(shared) is shared


def test_words_for_over_are_checked():
    with pytest.raises(ValueError, match='over must be "prompt", "batch" or "stream", got \'day\''):
        Budget.tokens(4, over="day")
    with pytest.raises(ValueError, match="single prompt, got over='stream'; count tokens entering"):
        Budget.tokens(4, counted="leaving", over="stream")
