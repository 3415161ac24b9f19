"""The solver: integers that spend the budget exactly, for any curve and decided layers."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from autoprune.policy.budget import Budget, InfeasibleBudget
from autoprune.policy.cost import DecoderCost
from autoprune.policy.curves import CURVES
from autoprune.policy.solver import solve_schedule
from tests.policy.examples import examples

LLAVA_7B = DecoderCost(32, 4096, 32, 32, 128, 11008)


@dataclass(frozen=True)
class Problem:
    """One prompt, the counts of its first layers, and the bounds of each layer that follow from them."""

    weights: np.ndarray
    visual: int
    fixed: tuple[int, ...]
    lower: tuple[int, ...]
    upper: tuple[int, ...]

    @property
    def layers(self) -> int:
        return len(self.weights)

    @property
    def decided(self) -> int:
        return len(self.fixed)

    def solve(self, budget: Budget | float, **options: Any) -> list[int]:
        fixed = [self.fixed] if self.fixed else None
        result = solve_schedule(self.weights, self.visual, budget, fixed=fixed, **options)
        assert result.dtype == np.int64
        assert result.shape == (1, self.layers)
        return result[0].tolist()

    def check(self, counts: list[int]) -> None:
        for layer, count in enumerate(counts):
            assert self.lower[layer] <= count <= self.upper[layer], layer
        assert all(a >= b for a, b in itertools.pairwise(counts))


def random_weights(rng: np.random.Generator, layers: int) -> np.ndarray:
    style = rng.integers(4)
    if style == 0:
        curve = CURVES[str(rng.choice(list(CURVES)))]
        return curve(np.arange(layers), rng.uniform(0, 3), rng.uniform(-5, layers + 5))[0]
    if style == 1:
        return rng.uniform(0.01, 1, layers)
    if style == 2:
        return np.full(layers, rng.uniform(1e-3, 1e3))
    return 10.0 ** rng.uniform(-rng.choice([1, 12, 60]), 0, layers)


def random_problem(rng: np.random.Generator, max_layers: int) -> Problem:
    layers = int(rng.integers(1, max_layers + 1))
    visual = int(rng.choice([1, 2, rng.integers(1, 40), rng.integers(1, 3000)]))
    fixed: list[int] = []
    if rng.random() < 0.5:
        cuts = rng.uniform(0, 1, int(rng.integers(1, layers + 1)))
        fixed = [visual, *sorted((int(np.ceil(visual * c)) for c in cuts), reverse=True)]
        fixed = fixed[: int(rng.integers(1, min(layers, 5) + 1))]
    free, last = layers - len(fixed), (fixed or [visual])[-1]
    lower, upper = (*fixed, *[min(last, 1)] * free), (*fixed, *[last] * free)
    return Problem(random_weights(rng, layers), visual, tuple(fixed), lower, upper)


@st.composite
def problems(draw: st.DrawFn, max_layers: int = 48) -> Problem:
    rng = np.random.default_rng(draw(st.integers(0, 2**63)))
    return random_problem(rng, max_layers)


def ideal_counts(problem: Problem, total: int) -> list[float]:
    """The real-valued schedule, by bisection on the scale; the solver has it in closed form."""
    falling = np.minimum.accumulate(problem.weights)
    low, high = -400.0, 400.0
    for _ in range(200):
        middle = (low + high) / 2
        counts = np.clip(10.0**middle * falling, problem.lower, problem.upper)
        low, high = (middle, high) if counts.sum() < total else (low, middle)
    return counts.tolist()


# Token budgets -----------------------------------------------------------------------------------


def check_exact(problem: Problem, share: float) -> None:
    least, most = sum(problem.lower), sum(problem.upper)
    total = max(1, round(least + share * (most - least)))
    assume(total <= most)
    counts = problem.solve(total / problem.layers)
    assert sum(counts) == total
    problem.check(counts)
    for count, ideal in zip(counts, ideal_counts(problem, total), strict=True):
        assert abs(count - ideal) < 1 + 1e-6


@examples(200)
@given(problems(), st.floats(0, 1))
def test_spends_any_feasible_budget_exactly_and_follows_the_curve(problem, share):
    check_exact(problem, share)


def test_spends_the_budget_exactly_in_thousands_of_random_settings():
    rng = np.random.default_rng(7)
    for _ in range(250):
        layers, batch = int(rng.integers(1, 81)), 16
        visual = rng.integers(1, rng.choice([10, 600, 3000]), batch)
        weights = np.stack([random_weights(rng, layers) for _ in range(batch)])
        mean = rng.uniform(1, visual.max() + 2)
        counts = solve_schedule(weights, visual, mean)
        expected = np.minimum(np.rint(layers * mean), layers * visual)
        assert counts.sum(axis=1).tolist() == expected.tolist()
        assert (np.diff(counts, axis=1) <= 0).all()
        assert (counts >= 1).all()
        assert (counts[:, 0] <= visual).all()


@examples(200)
@given(st.integers(1, 40), st.integers(1, 700), st.floats(0.01, 1.0), st.integers(0, 2**32))
def test_ratio_is_a_share_of_each_prompts_own_tokens(layers, visual, ratio, seed):
    total = round(layers * ratio * visual)
    assume(total >= layers)
    weights = random_weights(np.random.default_rng(seed), layers)
    counts = solve_schedule(weights, [visual, 700], Budget.ratio(ratio))
    assert counts[0].sum() == total
    assert counts[1].sum() == min(layers * 700, round(layers * ratio * 700))


def test_rounds_like_python():
    for layers in (3, 5, 7):
        assert solve_schedule(np.ones(layers), 10, 2.5).sum() == round(layers * 2.5)


@pytest.mark.parametrize("budget", [576, 577, 10_000, Budget.ratio(1), Budget.flops(1.0)])
def test_a_budget_of_everything_prunes_nothing(budget):
    weights = CURVES["logistic"](np.arange(32), 2.0, 15.0)
    options = {"cost": LLAVA_7B, "num_text": 71}
    assert (solve_schedule(weights, 576, budget, **options) == 576).all()
    fixed = [[576, 576]]
    assert (solve_schedule(weights, 576, budget, fixed=fixed, **options) == 576).all()


def test_prompts_without_visual_tokens_get_zeros():
    weights, cost = np.ones((3, 4)), DecoderCost(4, 8, 1, 1, 8, 16)
    for budget in (4, Budget.ratio(0.5), Budget.flops(0.9), Budget.kv_bytes(2000)):
        counts = solve_schedule(
            weights, [0, 9, 0], budget, cost=cost, num_text=[3, 3, 500], fixed=[[0], [9], [0]]
        )
        assert counts[[0, 2]].sum() == 0
        assert counts[1, 0] == 9
    assert solve_schedule(np.ones(4), [0], 2).tolist() == [[0, 0, 0, 0]]


def test_curves_that_rise_are_flattened():
    rising, flat = [1.0, 0.2, 0.9, 0.1], [1.0, 0.2, 0.2, 0.1]
    np.testing.assert_array_equal(solve_schedule(rising, 90, 20), solve_schedule(flat, 90, 20))


def test_all_layers_may_be_fixed_if_they_spend_the_budget():
    fixed = [[9, 6, 3]]
    assert solve_schedule(np.ones(3), 9, 6, fixed=fixed).tolist() == fixed
    with pytest.raises(InfeasibleBudget, match="at most 6 visual tokens"):
        solve_schedule(np.ones(3), 9, 7, fixed=fixed)


# Leaving counts ----------------------------------------------------------------------------------


def leaving_sum(counts: list[int]) -> int:
    return sum([*counts[1:], counts[-1]])


@examples(200)
@given(problems(max_layers=5), st.data())
def test_leaving_budgets_are_exact_wherever_that_is_possible(problem, data):
    assume(problem.visual <= 9)
    decided = max(problem.decided, 1) if problem.layers > 1 else problem.decided
    entry = problem.lower[0] if problem.decided else problem.upper[0]
    ranges = [range(problem.lower[i], problem.upper[i] + 1) for i in range(problem.layers)]
    if decided:
        ranges[0] = range(entry, entry + 1)
    possible = {
        leaving_sum(list(counts))
        for counts in itertools.product(*ranges)
        if all(a >= b for a, b in itertools.pairwise(counts))
    }
    total = data.draw(st.integers(1, problem.layers * problem.visual))
    budget = Budget.tokens(total / problem.layers, counted="leaving")
    if total not in possible:
        with pytest.raises(InfeasibleBudget):
            problem.solve(budget)
        return
    counts = problem.solve(budget)
    assert leaving_sum(counts) == total
    problem.check(counts)


@examples(200)
@given(problems(), st.floats(0, 1))
def test_leaving_budgets_are_exact_for_deep_models(problem, share):
    assume(problem.layers >= 4 and problem.decided <= 2)
    least = leaving_sum(list(problem.lower))
    most = leaving_sum(list(problem.upper))
    total = max(1, round(least + share * (most - least)))
    assume(total < most - 1)
    counts = problem.solve(Budget.tokens(total / problem.layers, counted="leaving"))
    assert leaving_sum(counts) == total
    problem.check(counts)


def test_leaving_budget_counts_nothing_of_layer_zero():
    counts = solve_schedule(np.ones(4), 100, Budget.tokens(10, counted="leaving"))
    assert counts.tolist() == [[100, 10, 10, 10]]


def test_leaving_budget_of_two_layers_must_be_even():
    even = solve_schedule(np.ones(2), 9, Budget.tokens(3, counted="leaving"))
    assert even.tolist() == [[9, 3]]
    with pytest.raises(InfeasibleBudget, match="no schedule of these layers has exactly that sum"):
        solve_schedule(np.ones(2), 9, Budget.tokens(3.5, counted="leaving"))


# FLOPs and KV bytes ------------------------------------------------------------------------------


@st.composite
def costs(draw: st.DrawFn) -> DecoderCost:
    heads = draw(st.sampled_from([1, 4, 28]))
    return DecoderCost(
        layers=1,
        hidden=draw(st.sampled_from([1, 64, 3584])),
        heads=heads,
        kv_heads=draw(st.sampled_from([1, heads])),
        head_dim=draw(st.sampled_from([1, 16, 128])),
        intermediate=draw(st.sampled_from([1, 128, 18944])),
        gated_mlp=draw(st.booleans()),
    )


def raised(problem: Problem, counts: list[int]) -> list[list[int]]:
    """Every schedule with one more token in one layer that the bounds allow."""
    results = []
    for layer in range(problem.decided, problem.layers):
        more = counts.copy()
        more[layer] += 1
        if more[layer] <= problem.upper[layer] and (layer == 0 or more[layer] <= more[layer - 1]):
            results.append(more)
    return results


@examples(200)
@given(problems(), costs(), st.integers(0, 300), st.floats(1e-3, 1.0))
def test_flops_are_never_exceeded_and_no_token_more_fits(problem, cost, text, share):
    cost = replace(cost, layers=problem.layers)
    full = cost.prefill_flops([problem.visual] * problem.layers, text)
    budget = Budget.flops(share)
    if cost.prefill_flops(list(problem.lower), text) > share * full:
        with pytest.raises(InfeasibleBudget):
            problem.solve(budget, cost=cost, num_text=text)
        return
    counts = problem.solve(budget, cost=cost, num_text=text)
    problem.check(counts)
    assert cost.prefill_flops(counts, text) <= share * full
    for more in raised(problem, counts):
        assert cost.prefill_flops(more, text) > share * full


@examples(200)
@given(problems(), costs(), st.integers(0, 300), st.floats(1e-3, 1.2))
def test_kv_bytes_are_never_exceeded_and_no_token_more_fits(problem, cost, text, share):
    cost = replace(cost, layers=problem.layers)
    size = max(1, int(share * cost.kv_bytes([problem.visual] * problem.layers, text)))
    budget = Budget.kv_bytes(size)
    if cost.kv_bytes(list(problem.lower), text) > size:
        with pytest.raises(InfeasibleBudget):
            problem.solve(budget, cost=cost, num_text=text)
        return
    counts = problem.solve(budget, cost=cost, num_text=text)
    problem.check(counts)
    assert cost.kv_bytes(counts, text) <= size
    for more in raised(problem, counts):
        assert cost.kv_bytes(more, text) > size


@pytest.mark.parametrize("difference", [-1, 0, 1])
def test_a_budget_one_flop_beside_a_flat_schedule_is_not_exceeded(difference):
    full = LLAVA_7B.prefill_flops([576] * 32, 71)
    for count in range(1, 576, 7):
        share = (LLAVA_7B.prefill_flops([count] * 32, 71) + difference) / full
        if difference < 0 and count == 1:
            continue
        counts = solve_schedule(np.ones(32), 576, Budget.flops(share), LLAVA_7B, 71)
        assert LLAVA_7B.prefill_flops(counts[0], 71) <= share * full
        assert counts.sum() >= 32 * count - (1 if difference <= 0 else 0)


def test_flops_follow_the_curve_of_a_real_decoder():
    weights = CURVES["logistic"](np.arange(32), 0.3, 15.0)
    counts = solve_schedule(weights, 576, Budget.flops(0.3), LLAVA_7B, 71, fixed=[[576, 300]])
    unspent = 0.3 * LLAVA_7B.prefill_flops([576] * 32, 71) - LLAVA_7B.prefill_flops(counts[0], 71)
    assert 0 <= unspent < LLAVA_7B.layer_flops(72) - LLAVA_7B.layer_flops(71)
    levels = (counts[0, 2:] + np.array([[-1], [1]])) / weights[0, 2:]
    assert levels[0].max() < levels[1].min()


def test_cost_is_asked_for():
    for budget in (Budget.flops(0.5), Budget.kv_bytes(10**6)):
        with pytest.raises(ValueError, match=r"pass cost=DecoderCost\.from_config"):
            solve_schedule(np.ones(4), 9, budget)
        with pytest.raises(ValueError, match="cost describes 32 layers, but the schedule has 4"):
            solve_schedule(np.ones(4), 9, budget, LLAVA_7B)


# Independence of the batch -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "budget",
    [
        Budget.tokens(40.3),
        Budget.ratio(0.3),
        Budget.tokens(40, counted="leaving"),
        Budget.flops(0.4),
        Budget.kv_bytes(90_000_000),
    ],
    ids=str,
)
def test_rows_are_the_same_in_any_batch(budget):
    rng = np.random.default_rng(5)
    batch, layers = 33, 32
    weights = np.stack([random_weights(rng, layers) for _ in range(batch)])
    visual, text = rng.integers(200, 700, batch), rng.integers(1, 100, batch)
    fixed = np.stack([visual, visual // 2], axis=1)
    together = solve_schedule(weights, visual, budget, LLAVA_7B, text, fixed)
    for row in range(batch):
        alone = solve_schedule(weights[row], visual[row], budget, LLAVA_7B, text[row], fixed[[row]])
        np.testing.assert_array_equal(together[row], alone[0])
    order = rng.permutation(batch)
    shuffled = np.asfortranarray(weights[order])
    again = solve_schedule(shuffled, visual[order], budget, LLAVA_7B, text[order], fixed[order])
    np.testing.assert_array_equal(again, together[order])


def test_inputs_are_left_as_they_were():
    weights, fixed = np.array([[0.5, 0.9, 0.1]]), np.array([[9]])
    before = [weights.copy(), fixed.copy()]
    solve_schedule(weights, [9], 4, fixed=fixed)
    for array, copy in zip((weights, fixed), before, strict=True):
        np.testing.assert_array_equal(array, copy)


# Refusals ----------------------------------------------------------------------------------------


@examples(200)
@given(problems(), st.sampled_from(["entering", "leaving", "ratio"]))
def test_the_smallest_feasible_budget_works_and_one_token_less_does_not(problem, unit):
    total = sum(problem.lower)
    asked = Budget.tokens(1) if unit != "ratio" else Budget.ratio(0.5)
    scale = problem.layers * (problem.visual if unit == "ratio" else 1)
    if unit == "leaving":
        asked = Budget.tokens(1, counted="leaving")
        total = leaving_sum(list(problem.lower)) if problem.layers > 1 else total
    assume(total >= 2)
    with pytest.raises(InfeasibleBudget) as refusal:
        problem.solve(replace(asked, value=(total - 1) / scale))
    smallest = refusal.value.smallest
    assert smallest.expression in str(refusal.value)
    assert round(smallest.value * scale) == total
    counts = problem.solve(smallest)
    assert (
        leaving_sum(counts) if unit == "leaving" and problem.layers > 1 else sum(counts)
    ) == total


@examples(200)
@given(problems(), costs(), st.integers(0, 300))
def test_the_smallest_feasible_flops_and_bytes_work(problem, cost, text):
    cost = replace(cost, layers=problem.layers)
    options = {"cost": cost, "num_text": text}
    assume(sum(problem.lower) > 0)
    for asked, floor_cost, full in (
        (Budget.flops(1e-12), cost.prefill_flops, None),
        (Budget.kv_bytes(1), cost.kv_bytes, 1),
    ):
        full = full or cost.prefill_flops([problem.visual] * problem.layers, text)
        least = floor_cost(list(problem.lower), text)
        with pytest.raises(InfeasibleBudget) as refusal:
            problem.solve(asked, **options)
        smallest = refusal.value.smallest
        problem.solve(smallest, **options)
        assert least <= smallest.value * full <= least + 2e-8 * full
        below = replace(asked, value=smallest.value - 1 if full == 1 else smallest.value - 2e-8)
        with pytest.raises(InfeasibleBudget):
            problem.solve(below, **options)


def test_the_worst_prompt_of_a_batch_sets_the_smallest_budget():
    fixed = [[576], [144]]
    with pytest.raises(InfeasibleBudget) as refusal:
        solve_schedule(np.ones(32), [576, 144], 10, fixed=fixed)
    assert refusal.value.asked == Budget.tokens(10)
    assert refusal.value.smallest == Budget.tokens(18.9688)  # (576 + 31) / 32, rounded up
    solve_schedule(np.ones(32), [576, 144], refusal.value.smallest, fixed=fixed)


def test_refusal_names_the_first_cut_option_only_where_it_helps():
    with pytest.raises(InfeasibleBudget) as refusal:
        solve_schedule(np.ones(32), 576, 16, fixed=[[576, 160]])
    message = str(refusal.value)
    assert "16 visual tokens per layer" in message
    assert "Budget.tokens(23.9375)" in message
    assert 'first_cut="pre_llm"' in message
    assert "down to Budget.tokens(1)" in message
    with pytest.raises(InfeasibleBudget) as refusal:
        solve_schedule(np.ones(32), 576, 0.4)
    assert "first_cut" not in str(refusal.value)
    assert "Budget.tokens(1)" in str(refusal.value)


def test_a_budget_that_cannot_be_spent_is_refused():
    with pytest.raises(InfeasibleBudget, match=r"allow at most 114\.875 visual tokens") as refusal:
        solve_schedule(np.ones(32), [576, 576, 0], 200, fixed=[[576, 100], [576, 500], [0, 0]])
    assert refusal.value.smallest is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weights": np.ones((2, 4))}, r"weights must be \[batch, L\] and num_visual \[batch\]"),
        ({"weights": np.zeros(4)}, "weights must be positive and finite"),
        ({"weights": [1, np.nan, 1, 1]}, "weights must be positive and finite"),
        ({"weights": [1, np.inf, 1, 1]}, "weights must be positive and finite"),
        ({"weights": np.ones((1, 0))}, "weights must be"),
        ({"num_visual": -1}, "must not be negative"),
        ({"num_text": -1}, "must not be negative"),
        ({"fixed": [[9, 5], [9, 5]]}, "fixed must be"),
        ({"fixed": [[9, 5, 5, 5, 5]]}, "fixed must be"),
        ({"fixed": [[5, 9]]}, "fixed must start at or below num_visual and never increase"),
        ({"fixed": [[10]]}, "fixed must start at or below num_visual"),
    ],
)
def test_refuses_inputs_that_do_not_fit(change, message):
    options = {"weights": np.ones(4), "num_visual": 9, "budget": 4, **change}
    with pytest.raises(ValueError, match=message):
        solve_schedule(**options)
