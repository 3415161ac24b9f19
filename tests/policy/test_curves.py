"""Retention curves: shape, limits and what makes the families interchangeable."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from autoprune.policy.curves import CURVES, FLOOR, get_curve
from tests.policy.examples import examples

FALLING = [name for name in CURVES if name != "constant"]
slopes = st.one_of(st.just(0.0), st.floats(1e-6, 50.0), st.floats(1e3, 1e8))
midpoints = st.floats(-20.0, 120.0)


@pytest.mark.parametrize("name", CURVES)
@examples(100)
@given(slopes, midpoints, st.integers(1, 100))
def test_stays_positive_and_never_increases(name, slope, midpoint, layers):
    retention = CURVES[name](np.arange(layers), slope, midpoint)
    assert retention.shape == (1, layers)
    assert retention.dtype == np.float64
    assert (retention >= FLOOR).all()
    assert (retention <= 1).all()
    assert (np.diff(retention) <= 0).all()


@pytest.mark.parametrize("name", CURVES)
def test_is_half_at_the_midpoint_and_everywhere_without_slope(name):
    layers = np.arange(33)
    assert CURVES[name](layers, 0.4, 16.0)[0, 16] == 0.5
    assert (CURVES[name](layers, 0.0, 15.3) == 0.5).all()


@pytest.mark.parametrize("name", FALLING)
def test_a_steep_slope_gives_everything_before_the_midpoint_and_nothing_after(name):
    retention = CURVES[name](np.arange(32), 1e6, 15.5)[0]
    assert (retention[:16] == 1).all()
    assert (retention[16:] == FLOOR).all()


@pytest.mark.parametrize("name", ["logistic", "linear", "exponential"])
def test_falls_by_a_quarter_of_the_slope_at_the_midpoint(name):
    step = 1e-4
    before, after = CURVES[name](np.array([10.0 - step, 10.0 + step]), 0.8, 10.0)[0]
    assert (after - before) / (2 * step) == pytest.approx(-0.2, rel=1e-4)


def test_formulas():
    layers, k, x0 = np.arange(6), 0.7, 2.5
    u = k * (layers - x0)
    expected = {
        "logistic": 1 / (1 + np.exp(u)),
        "linear": np.clip(0.5 - u / 4, FLOOR, 1),
        "tanh": (1 - np.tanh(u)) / 2,
        "exponential": np.clip(np.exp(-u / 2) / 2, FLOOR, 1),
        "step": np.where(layers < x0, 1 / (1 + np.exp(-k * x0 / 2)), 1 / (1 + np.exp(k * x0 / 2))),
        "constant": np.full(6, 0.5),
    }
    assert set(expected) == set(CURVES)
    for name, values in expected.items():
        np.testing.assert_allclose(CURVES[name](layers, k, x0)[0], values, rtol=1e-14)


@pytest.mark.parametrize("name", CURVES)
def test_rows_do_not_depend_on_the_batch(name):
    generator = np.random.default_rng(0)
    slope, midpoint = generator.uniform(0, 2, 37), generator.uniform(0, 40, 37)
    layers = np.arange(32)
    together = CURVES[name](layers, slope, midpoint)
    assert together.shape == (37, 32)
    for row in range(37):
        alone = CURVES[name](layers, slope[row], midpoint[row])
        np.testing.assert_array_equal(together[row], alone[0])
    np.testing.assert_array_equal(
        CURVES[name](layers, slope, 15.0), CURVES[name](layers, slope, np.full(37, 15.0))
    )


def test_absolute_indices_need_not_start_at_zero():
    full = CURVES["logistic"](np.arange(32), 0.4, 15.0)
    np.testing.assert_array_equal(CURVES["logistic"](np.arange(5, 32), 0.4, 15.0), full[:, 5:])


def test_get_curve():
    assert get_curve("logistic") is CURVES["logistic"]
    with pytest.raises(
        ValueError, match="unknown curve 'sigmoid'; choose one of: logistic, linear"
    ):
        get_curve("sigmoid")


@pytest.mark.parametrize("name", CURVES)
@pytest.mark.parametrize(
    ("slope", "midpoint", "message"),
    [
        (-0.1, 15.0, "slope must be finite and at least 0"),
        (float("nan"), 15.0, "slope must be finite"),
        (float("inf"), 15.0, "slope must be finite"),
        (0.4, float("nan"), "midpoint must be finite"),
        ([0.4, 0.3], [1.0, 2.0, 3.0], "differ in batch size"),
        ([[0.4]], 15.0, "scalars or"),
    ],
)
def test_refuses_parameters_that_are_no_curve(name, slope, midpoint, message):
    with pytest.raises(ValueError, match=message):
        CURVES[name](np.arange(8), slope, midpoint)
