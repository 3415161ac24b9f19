"""Budget: what it accepts, what it refuses, and how it reads."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest

from autoprune.policy.budget import Budget


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
