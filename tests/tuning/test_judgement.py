"""Intervals are right by hand, and the default stays where it is not beaten beyond them."""

from __future__ import annotations

import numpy as np
import pytest

from autoprune import AutoPrune
from autoprune.evaluation.answering import Refused
from autoprune.methods.fastv import FastV
from autoprune.tuning.agreement import Scores
from autoprune.tuning.judgement import DEFAULT, TUNED, choose, judge, mean_by_picture

TRIED = AutoPrune(16, k0=0.7)


def scores(agreement):
    same = np.array(agreement, float)
    return Scores(same, 1 - same, same + 5, same + 7, same)


def judged(tuned, default, other=None, method=TRIED, pictures=None):
    given = {method: tuned, AutoPrune(16): default, FastV(16): other}

    def ask(asked):
        if given[asked] is None:
            raise Refused(f"no room for {asked.name}")
        return scores(given[asked])

    contenders = {TUNED: method, DEFAULT: AutoPrune(16), "fastv": FastV(16)}
    count = max(len(own) for own in given.values() if own is not None)
    return judge(contenders, ask, range(count) if pictures is None else pictures)


def test_a_mean_and_its_interval_are_those_of_the_binomial():
    # 40 of 100 pictures are right: the standard error is sqrt(.4 x .6 / 100) = .049.
    (found,) = mean_by_picture([np.repeat([1.0, 0.0], [40, 60])], range(100))
    assert found.value == pytest.approx(0.4)
    assert found.low == pytest.approx(0.4 - 1.96 * 0.049, abs=0.015)
    assert found.high == pytest.approx(0.4 + 1.96 * 0.049, abs=0.015)


def test_prompts_about_one_picture_are_one_witness():
    one_each = np.repeat([1.0, 0.0], [20, 20])
    four_each, pictures = np.repeat(one_each, 4), np.repeat(np.arange(40), 4)
    (alone,) = mean_by_picture([one_each], range(40))
    (together,) = mean_by_picture([four_each], pictures)
    assert (together.low, together.high) == pytest.approx((alone.low, alone.high))
    (apart,) = mean_by_picture([four_each], range(160))
    assert apart.high - apart.low == pytest.approx((alone.high - alone.low) / 2, rel=0.1)
    # The mean is that over prompts, however many a picture has.
    uneven = mean_by_picture([np.array([1.0] * 9 + [0.0] * 11)], [0] * 9 + list(range(1, 12)))
    assert uneven[0].value == pytest.approx(9 / 20)


def test_differences_are_paired():
    # 200 prompts, of which the tuned one wins 20 and loses none: 0.1 with a standard error of .0212.
    default = np.repeat([1.0, 0.0], [120, 80])
    tuned = np.repeat([1.0, 0.0], [140, 60])
    rows = judged(tuned, default, other=None)
    gain = rows[0].difference
    assert gain.value == pytest.approx(0.1)
    assert gain.low == pytest.approx(0.1 - 1.96 * 0.0212, abs=0.006)
    assert gain.high == pytest.approx(0.1 + 1.96 * 0.0212, abs=0.006)
    assert rows[1].difference is None
    assert rows[2].agreement is None and rows[2].reason == "no room for fastv"
    assert (rows[0].divergence, rows[0].entering) == (pytest.approx(0.3), pytest.approx(5.7))
    chosen, verdict = choose(rows)
    assert chosen.method == TRIED and "better than the default by +10.0 [+" in verdict


def test_the_default_stays_where_the_gain_may_be_chance():
    default = np.repeat([1.0, 0.0], [30, 20])
    tuned = default.copy()
    tuned[[30, 31, 0]] = 1, 1, 0
    chosen, verdict = choose(judged(tuned, default))
    assert chosen.method == AutoPrune(16)
    assert "not better than the default beyond chance (+2.0 [" in verdict
    chosen, verdict = choose(judged(default, default, method=AutoPrune(16)))
    assert chosen.label == DEFAULT and "nothing better than the default" in verdict


def test_too_few_pictures_to_tell_leave_the_default():
    rows = judged(np.ones(9), np.zeros(9))
    assert rows[0].difference.low is None
    assert choose(rows)[0].label == DEFAULT


def test_where_the_default_cannot_run_what_was_tuned_is_taken():
    rows = judged(np.zeros(20), None, np.ones(20))
    chosen, verdict = choose(rows)
    assert chosen.label == TUNED and "default cannot run here: no room for autoprune" in verdict
    assert all(own.difference is None for own in rows)
    with pytest.raises(Refused, match="no room"):
        choose(judged(None, None, np.ones(20)))
