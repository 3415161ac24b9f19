"""Intervals cover what they should, and pairing sees what single intervals cannot."""

from __future__ import annotations

import numpy as np
import pytest

from autoprune.evaluation.statistics import bootstrap, bootstrap_median


def hits(*shares, count=400):
    """[settings, count], the first so many of each row right."""
    return np.array([np.arange(count) < round(share * count) for share in shares])


def accuracies_of(correct, kinds=None, **options):
    (found,) = bootstrap([correct], kinds or ["all"] * len(correct[0]), **options)
    return found


def test_the_interval_of_a_share_is_the_binomial_one():
    found = accuracies_of(hits(0.8)).kinds["all"].estimate(0)
    error = 1.96 * np.sqrt(0.8 * 0.2 / 400)
    assert found.value == 0.8
    assert found.low == pytest.approx(0.8 - error, abs=0.006)
    assert found.high == pytest.approx(0.8 + error, abs=0.006)


def test_questions_that_differ_are_what_a_paired_difference_hangs_on():
    accuracies = accuracies_of(hits(0.8, 0.77))
    paired = accuracies.macro.difference(1, 0)
    assert paired.value == pytest.approx(-0.03)
    error = 1.96 * np.sqrt(0.03 * 0.97 / 400)
    assert paired.low == pytest.approx(-0.03 - error, abs=0.005)
    assert paired.high < 0
    assert accuracies.kinds["all"].estimate(1).high > 0.8


def test_a_setting_does_not_differ_from_itself():
    accuracies = accuracies_of(hits(0.5, 0.5))
    assert (accuracies.macro.difference(1, 0).low, accuracies.macro.difference(1, 0).high) == (0, 0)
    relative = accuracies.macro.ratio(1, 0)
    assert (relative.value, relative.low, relative.high) == (1, 1, 1)


def test_macro_weighs_kinds_alike_and_micro_questions():
    correct = np.array([[True] * 300 + [False] * 100])
    accuracies = accuracies_of(correct, ["easy"] * 300 + ["hard"] * 100)
    assert accuracies.macro.estimate(0).value == 0.5
    assert accuracies.micro.estimate(0).value == pytest.approx(0.75)
    assert accuracies.kinds["easy"].estimate(0).value == 1
    # The kinds keep their numbers of questions, so nothing is left to chance here.
    assert accuracies.macro.estimate(0).low == accuracies.macro.estimate(0).high == 0.5


def test_relative_accuracy_is_that_of_the_same_draw():
    accuracies = accuracies_of(hits(0.8, 0.4))
    relative = accuracies.macro.ratio(1, 0)
    assert relative.value == pytest.approx(0.5)
    # Delta method for 0.4 nested in 0.8: the share of the reference's hits that remain.
    error = 1.96 * np.sqrt(0.5 * 0.5 / 320)
    assert relative.low == pytest.approx(0.5 - error, abs=0.01)
    assert relative.high == pytest.approx(0.5 + error, abs=0.01)


def test_nothing_is_relative_to_a_model_that_is_never_right():
    assert accuracies_of(hits(0, 0.5)).macro.ratio(1, 0) is None


def test_the_seed_decides_the_draws():
    first, again, other = (
        accuracies_of(hits(0.7), seed=seed).macro.estimate(0) for seed in (0, 0, 1)
    )
    assert first == again
    assert first != other


def test_the_interval_covers_the_truth_about_95_times_in_100():
    rng = np.random.default_rng(0)
    correct = rng.random((300, 200)) < 0.7
    accuracies = accuracies_of(correct, resamples=1000)
    found = [accuracies.macro.estimate(setting) for setting in range(300)]
    covered = np.mean([estimate.low <= 0.7 <= estimate.high for estimate in found])
    assert 0.91 <= covered <= 0.98


def test_a_handful_of_questions_has_no_interval():
    few = accuracies_of(hits(0.5, 0.25, count=8))
    for found in (
        few.kinds["all"].estimate(0),
        few.macro.estimate(0),
        few.micro.estimate(0),
        few.macro.difference(1, 0),
    ):
        assert found.low is found.high is None
    mixed = accuracies_of(hits(0.5, count=40), ["many"] * 32 + ["few"] * 8)
    assert mixed.kinds["many"].estimate(0).low is not None
    assert mixed.macro.estimate(0).low is None


def test_figures_share_their_draws():
    rng = np.random.default_rng(0)
    right = rng.random((2, 300)) < 0.6
    cost = np.where(right, 5.0, 3.0)
    accuracies, costs = bootstrap([right, cost], ["easy"] * 100 + ["hard"] * 200)
    np.testing.assert_allclose(costs.micro.resampled, 3 + 2 * accuracies.micro.resampled)


def test_a_cost_that_all_questions_share_has_no_width():
    (costs,) = bootstrap([np.full((2, 60), [[3e12], [1e12]])], ["easy"] * 20 + ["hard"] * 40)
    share = costs.micro.ratio(1, 0)
    assert share.low == pytest.approx(share.high) == pytest.approx(1 / 3)


def test_a_share_of_the_whole_cost_weighs_questions_by_what_they_cost():
    full = np.array([[10.0] * 50 + [100.0] * 50])
    own = np.array([[10.0] * 50 + [20.0] * 50])
    (costs,) = bootstrap([np.concatenate([full, own])], ["all"] * 100)
    share = costs.micro.ratio(1, 0)
    assert share.value == pytest.approx(1500 / 5500)
    # Delta method for a ratio of means.
    rest = own - share.value * full
    error = 1.96 * rest.std() / full.mean() / np.sqrt(100)
    assert share.low == pytest.approx(share.value - error, abs=0.01)
    assert share.high == pytest.approx(share.value + error, abs=0.01)


def test_a_median_is_that_of_the_values_and_ratios_are_paired():
    noise = np.random.default_rng(0).uniform(1, 2, 40)
    times = bootstrap_median(np.stack([4 * noise, noise]))
    slow, fast = times.estimate(0), times.estimate(1)
    assert slow.value == np.median(4 * noise)
    assert slow.low < slow.value < slow.high
    assert fast.high == pytest.approx(slow.high / 4)
    speedup = times.ratio(0, 1)
    assert (speedup.low, speedup.value, speedup.high) == pytest.approx((4, 4, 4))


def test_a_handful_of_values_has_no_interval():
    found = bootstrap_median(np.ones((1, 9))).estimate(0)
    assert (found.value, found.low, found.high) == (1, None, None)
