"""Intervals cover what they should, and pairing sees what single intervals cannot."""

from __future__ import annotations

import numpy as np
import pytest

from autoprune.evaluation.statistics import bootstrap


def hits(*shares, count=400):
    """[settings, count], the first so many of each row right."""
    return np.array([np.arange(count) < round(share * count) for share in shares])


def test_the_interval_of_a_share_is_the_binomial_one():
    found = bootstrap(hits(0.8), ["all"] * 400).kind("all", 0)
    error = 1.96 * np.sqrt(0.8 * 0.2 / 400)
    assert found.value == 0.8
    assert found.low == pytest.approx(0.8 - error, abs=0.006)
    assert found.high == pytest.approx(0.8 + error, abs=0.006)


def test_questions_that_differ_are_what_a_paired_difference_hangs_on():
    accuracies = bootstrap(hits(0.8, 0.77), ["all"] * 400)
    paired = accuracies.difference(1, 0)
    assert paired.value == pytest.approx(-0.03)
    error = 1.96 * np.sqrt(0.03 * 0.97 / 400)
    assert paired.low == pytest.approx(-0.03 - error, abs=0.005)
    assert paired.high < 0
    assert accuracies.kind("all", 1).high > 0.8


def test_a_setting_does_not_differ_from_itself():
    accuracies = bootstrap(hits(0.5, 0.5), ["all"] * 400)
    assert (accuracies.difference(1, 0).low, accuracies.difference(1, 0).high) == (0, 0)
    relative = accuracies.relative(1, 0)
    assert (relative.value, relative.low, relative.high) == (1, 1, 1)


def test_macro_weighs_kinds_alike_and_micro_questions():
    correct = np.array([[True] * 300 + [False] * 100])
    accuracies = bootstrap(correct, ["easy"] * 300 + ["hard"] * 100)
    assert accuracies.macro(0).value == 0.5
    assert accuracies.micro(0).value == pytest.approx(0.75)
    assert accuracies.kind("easy", 0).value == 1
    # The kinds keep their numbers of questions, so nothing is left to chance here.
    assert accuracies.macro(0).low == accuracies.macro(0).high == 0.5


def test_relative_accuracy_is_that_of_the_same_draw():
    accuracies = bootstrap(hits(0.8, 0.4), ["all"] * 400)
    relative = accuracies.relative(1, 0)
    assert relative.value == pytest.approx(0.5)
    # Delta method for 0.4 nested in 0.8: the share of the reference's hits that remain.
    error = 1.96 * np.sqrt(0.5 * 0.5 / 320)
    assert relative.low == pytest.approx(0.5 - error, abs=0.01)
    assert relative.high == pytest.approx(0.5 + error, abs=0.01)


def test_nothing_is_relative_to_a_model_that_is_never_right():
    assert bootstrap(hits(0, 0.5), ["all"] * 400).relative(1, 0) is None


def test_the_seed_decides_the_draws():
    first, again, other = (
        bootstrap(hits(0.7), ["all"] * 400, seed=seed).macro(0) for seed in (0, 0, 1)
    )
    assert first == again
    assert first != other


def test_the_interval_covers_the_truth_about_95_times_in_100():
    rng = np.random.default_rng(0)
    correct = rng.random((300, 200)) < 0.7
    accuracies = bootstrap(correct, ["all"] * 200, resamples=1000)
    found = [accuracies.macro(setting) for setting in range(300)]
    covered = np.mean([estimate.low <= 0.7 <= estimate.high for estimate in found])
    assert 0.91 <= covered <= 0.98


def test_a_handful_of_questions_has_no_interval():
    few = bootstrap(hits(0.5, 0.25, count=8), ["all"] * 8)
    for found in (few.kind("all", 0), few.macro(0), few.micro(0), few.difference(1, 0)):
        assert found.low is found.high is None
    mixed = bootstrap(hits(0.5, count=40), ["many"] * 32 + ["few"] * 8)
    assert mixed.kind("many", 0).low is not None
    assert mixed.macro(0).low is None
