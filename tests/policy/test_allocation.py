"""Who gets how much of a sum: right values by hand, by a slow loop, and properties."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from autoprune.policy.allocation import LossCurve, share_sum
from tests.policy.examples import examples


def curve(costs, losses, least=None, most=None):
    costs, losses = np.array(costs, float), np.array(losses, float)
    least = int(costs[0]) if least is None else least
    return LossCurve.of(costs, losses, least, int(costs[-1]) if most is None else most)


def test_a_table_becomes_its_lower_convex_hull():
    # (2, 9) lies above the line from (1, 10) to (3, 4); the last rise stays.
    found = curve([1, 2, 3, 4, 6], [10, 9, 4, 3, 5])
    assert found.costs.tolist() == [1, 3, 4, 6]
    assert found.losses.tolist() == [10, 4, 3, 5]
    assert found.slopes.tolist() == [-3, -1, 1]


def test_limits_between_candidates_lie_on_the_line():
    found = curve([2, 4, 8], [8, 4, 2], least=3, most=6)
    assert (found.costs.tolist(), found.losses.tolist()) == ([3, 4, 6], [6, 4, 3])
    # Outside of the candidates the loss is that of the nearest.
    wide = curve([2, 4], [8, 4], least=1, most=9)
    assert (wide.costs.tolist(), wide.losses.tolist()) == ([1, 4, 9], [8, 4, 4])
    assert curve([2, 4], [8, 4], least=3, most=3).costs.tolist() == [3]


def test_the_price_at_a_cost_worked_out_by_hand():
    found = curve([1, 3, 4, 6], [10, 4, 3, 5])
    assert [found.price_at(cost) for cost in (1, 2, 3, 3.5, 4, 5)] == [3, 3, 3, 1, 1, 0]
    assert curve([2, 4], [8, 4], least=3, most=3).price_at(3) == 0


def test_the_cheapest_cost_worked_out_by_hand():
    found = curve([1, 3, 5], [10, 4, 2])
    # 10 + p, 4 + 3 p, 2 + 5 p.
    assert found.cheapest(0.5, 9, 1) == 5
    assert found.cheapest(2, 9, 1) == 3
    assert found.cheapest(4, 9, 5) == 1
    assert found.cheapest(0.5, 4, 1) == 4  # no more is there
    # At a price of 1 every cost from 3 to 5 is as good: the usual one, or what is next to it.
    assert [found.cheapest(1, 9, usual) for usual in (2, 3, 4, 5, 8)] == [3, 3, 4, 5, 5]


def test_the_best_gain_comes_first():
    steep, flat = curve([1, 3, 9], [12, 2, 1]), curve([1, 5, 9], [8, 4, 3])
    # Gains: steep 5 a unit up to 3, then 1/6; flat 1 a unit up to 5, then 1/4.
    for total, shares in [(2, (1, 1)), (3, (2, 1)), (4, (3, 1)), (6, (3, 3)), (10, (3, 7))]:
        assert tuple(share_sum([steep, flat], total)) == shares
    assert tuple(share_sum([steep, flat], 18)) == (9, 9)
    assert tuple(share_sum([steep, flat], 14)) == (5, 9)


def test_equal_gains_are_shared_in_proportion():
    same = [curve([1, 5], [8, 4])] * 2
    assert tuple(share_sum(same, 6)) == (3, 3)
    assert tuple(share_sum(same, 7)) == (4, 3)  # ties of rounding to the earlier
    longer = curve([1, 9], [8, 0])
    # 4 + 8 units at the same gain, 6 of them to be had.
    assert tuple(share_sum([same[0], longer], 8)) == (3, 5)


def slow_best(tables, total):
    """The smallest sum of losses of integer costs that sum to `total`, by trying all."""
    best = np.inf
    for costs in itertools.product(*(range(len(table)) for table in tables)):
        if sum(costs) == total:
            best = min(best, sum(t[c] for t, c in zip(tables, costs, strict=True)))
    return best


@st.composite
def convex_tables(draw):
    """Losses at costs 0, 1, 2, ... with gains that never grow."""
    number = draw(st.integers(1, 3))
    tables = []
    for _ in range(number):
        gains = sorted(draw(st.lists(st.integers(-3, 9), min_size=1, max_size=6)), reverse=True)
        tables.append(np.concatenate(([0], -np.cumsum(gains))).astype(float))
    total = draw(st.integers(0, sum(len(table) - 1 for table in tables)))
    return tables, total


@examples(150)
@given(convex_tables())
def test_no_other_shares_lose_less(case):
    tables, total = case
    shares = share_sum([curve(range(len(table)), table) for table in tables], total)
    assert sum(shares) == total
    # Whole units of equal gain may be split over prompts, and rounding gives them back whole.
    lost = sum(table[share] for table, share in zip(tables, shares, strict=True))
    assert lost == pytest.approx(slow_best(tables, total))


@st.composite
def curves(draw, largest=10_000):
    """Curves of any form, with limits of their own."""
    number = draw(st.integers(1, 6))
    found = []
    for _ in range(number):
        points = draw(st.integers(2, 8))
        costs = np.cumsum(draw(st.lists(st.floats(0.5, largest), min_size=points, max_size=points)))
        losses = draw(st.lists(st.floats(-10, 10), min_size=points, max_size=points))
        least = draw(st.integers(0, largest))
        most = least + draw(st.integers(0, largest))
        found.append(LossCurve.of(costs, np.array(losses), least, most))
    low, high = sum(c.least for c in found), sum(c.most for c in found)
    return found, draw(st.integers(low, high))


@examples(200)
@given(curves())
def test_the_sum_is_exact_and_nobody_leaves_its_limits(case):
    found, total = case
    shares = share_sum(found, total)
    assert sum(shares.tolist()) == total
    assert all(c.least <= share <= c.most for c, share in zip(found, shares, strict=True))


@examples(50)
@given(curves(largest=2**58))
def test_a_sum_beyond_double_precision_is_never_exceeded(case):
    found, total = case
    shares = share_sum(found, total)
    assert 0 <= total - sum(shares.tolist()) <= 1e-12 * total + len(found)
    assert all(c.least <= share <= c.most for c, share in zip(found, shares, strict=True))


@examples(100)
@given(curves(), st.floats(0, 1), st.integers(0, 20_000), st.integers(0, 20_000))
def test_the_cheapest_is_within_its_limits_and_no_dearer_than_any_other(case, price, room, usual):
    for found in case[0]:
        most = found.least + room
        share = found.cheapest(price, most, usual)
        assert found.least <= share <= min(most, found.most)
        at = np.linspace(found.least, min(most, found.most), 50)
        cost = np.interp([*at, share], found.costs, found.losses) + price * np.append(at, share)
        # A share is a whole unit, and rounded down.
        slack = 1e-6 + np.abs(found.slopes).max(initial=0) + price
        assert cost[-1] <= cost.min() + slack
