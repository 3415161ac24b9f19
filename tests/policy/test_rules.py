"""Rules of who gets how much: right values by hand, what is fitted, and what is refused."""

from __future__ import annotations

import json
import math
import warnings

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from autoprune.policy.rules import (
    CalibratedRule,
    InformationRule,
    Signals,
    features,
    predicted,
    rule_from_dict,
)
from tests.policy.examples import examples

TOKENS = np.array([1.0, 2.0, 4.0, 8.0])


def signals(information=1.0, participation=8.0, entropy=3.0, visual=144, text=20, own=16.0):
    return Signals(information, participation, entropy, visual, text, own)


def test_twice_the_information_wants_half_the_tokens():
    table = InformationRule()([signals(0.5), signals(1.0), signals(1.0, own=8.0)], TOKENS)
    gains = table[:, :1] - table[:, 1:]
    assert gains[0] == pytest.approx(2 * gains[1])
    assert gains[1] == pytest.approx(2 * gains[2])
    # Equal steps for each doubling: the loss is a logarithm.
    assert gains[0] == pytest.approx(gains[0][0] * np.array([1, 2, 3]))
    squared = InformationRule(2.0)([signals(0.5), signals(1.0)], TOKENS)
    assert squared[0, 0] - squared[0, 1] == pytest.approx(4 * (squared[1, 0] - squared[1, 1]))


def test_no_information_is_finite():
    for power in (0, 1, 100):
        assert np.isfinite(InformationRule(power)([signals(0.0), signals(50.0)], TOKENS)).all()


@pytest.mark.parametrize("power", [-1, math.nan, math.inf, "1", True, None])
def test_a_power_that_is_none_is_refused(power):
    with pytest.raises(ValueError, match="power must be a number from 0 to 100, got"):
        InformationRule(power)


def test_features_worked_out_by_hand():
    found = features([signals(1.5, 8.0, 2.5, 64, 31), signals(0.0, 0.0, 0.0, 1, 0)])
    assert found.tolist() == [[1.5, 3.0, 2.5, 6.0, 5.0], [0, 0, 0, 0, 0]]


def test_the_question_stands_behind_the_other_features():
    asked = [Signals(1.5, 8.0, 2.5, 64, 31, 16.0, (0.25, -3.0))]
    assert features(asked).tolist() == [[1.5, 3.0, 2.5, 6.0, 5.0, 0.25, -3.0]]
    with pytest.raises(ValueError, match=r"described by as many numbers, got \[0, 2\]"):
        features([*asked, signals()])


def test_a_rule_sees_which_kind_of_question_it_is():
    # Everything but the question is alike; answers to the first kind change at 4 tokens, the others never.
    random = np.random.default_rng(0)
    first = random.integers(0, 2, 800).astype(bool)
    asked = [
        Signals(1.0, 8.0, 3.0, 144, 20, 4.0, (2.0 if own else -2.0, random.normal()))
        for own in first
    ]
    agreement = np.stack([~first, np.ones(800)], axis=1)
    rule = CalibratedRule.fit(asked, [4.0, 16.0], agreement, ridge=3)
    lost = rule(asked[:50], np.array([4.0, 16.0]))
    assert (lost[first[:50], 0] > 0.95).all() and (lost[~first[:50], 0] < 0.05).all()
    assert (lost[:, 1] < 0.05).all()
    again = rule_from_dict(json.loads(json.dumps(rule.to_dict())))
    assert again == rule and repr(again) == repr(rule) and len(repr(rule)) < 100
    other = CalibratedRule.fit(asked[1:], [4.0, 16.0], agreement[1:])
    assert repr(other) != repr(rule)
    with pytest.raises(ValueError, match="looks at 7 features of a prompt, got 5; fit it anew"):
        rule([signals()], TOKENS)


def drawn(number, seed=0):
    """Prompts whose answers change at few tokens where the information is small."""
    random = np.random.default_rng(seed)
    bits = random.uniform(0, 2, number)
    prompts = [signals(b, random.uniform(1, 100), random.uniform(0, 7)) for b in bits]
    change = 1 / (1 + np.exp(3 * (bits[:, None] - 1) + np.log2([1, 2, 4]) * 2 - 1))
    return prompts, [4.0, 8.0, 16.0], random.uniform(size=change.shape) >= change, change


def test_fitting_finds_what_the_answers_depend_on():
    prompts, tokens, agreement, change = drawn(3000)
    rule = CalibratedRule.fit(prompts, tokens, agreement, ridge=3)
    others, _, _, expected = drawn(200, seed=1)
    assert np.abs(rule(others, np.array(tokens)) - expected).mean() < 0.03
    assert change.std() > 0.2
    # The other signals tell nothing.
    assert np.abs(np.array(rule.weights)[:, 2:4]).max() < 0.15
    assert np.array(rule.weights)[:, 1] == pytest.approx(-3 / np.sqrt(3), abs=0.3)


def test_a_regression_is_where_its_penalised_loss_has_no_slope():
    prompts, tokens, agreement, _ = drawn(200)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        rule = CalibratedRule.fit(prompts, tokens, agreement, ridge=2.0)
    seen = np.clip((features(prompts) - rule.mean) / rule.scale, -3, 3)

    def loss(weights, column):
        score = weights[0] + seen @ weights[1:]
        target = 1 - column
        return np.sum(np.logaddexp(0, score) - target * score) + weights[1:] @ weights[1:]

    for weights, column in zip(rule.weights, agreement.T.astype(float), strict=True):
        at = np.array(weights)
        for direction in np.eye(6):
            slope = (
                loss(at + 1e-4 * direction, column) - loss(at - 1e-4 * direction, column)
            ) / 2e-4
            assert abs(slope) < 1e-3


def test_between_budgets_the_line_above_them_the_last_and_without_tokens_all_is_lost():
    flat = ((0.0,) * 6, (-math.log(3),) + (0.0,) * 5)  # chances 1/2 and 1/4
    rule = CalibratedRule((4.0, 8.0), (0.0,) * 5, (1.0,) * 5, flat)
    assert rule([signals()], np.array([1, 4, 6, 8, 99.0]))[0] == pytest.approx(
        [0.875, 0.5, 0.375, 0.25, 0.25]
    )


@examples(60)
@given(
    st.lists(st.lists(st.floats(-9, 9), min_size=6, max_size=6), min_size=2, max_size=4),
    st.floats(0, 20),
    st.floats(0, 600),
)
def test_more_tokens_are_never_predicted_to_be_worse(weights, bits, participation):
    tokens = tuple(float(i + 1) for i in range(len(weights)))
    rule = CalibratedRule(tokens, (1.0,) * 5, (2.0,) * 5, tuple(map(tuple, weights)))
    losses = rule([signals(bits, participation)], np.linspace(0.5, 6, 30))[0]
    assert (np.diff(losses) <= 1e-12).all() and (losses >= 0).all() and (losses <= 1).all()


def test_answers_that_never_change_can_be_fitted():
    prompts, tokens, _, _ = drawn(500)
    rule = CalibratedRule.fit(prompts, tokens, np.ones((500, 3)))
    assert rule(prompts, np.array(tokens)).max() < 0.05
    alike = CalibratedRule.fit([signals()] * 500, tokens, np.tile([0, 0.5, 1], (500, 1)))
    assert alike([signals()], np.array(tokens))[0] == pytest.approx([1, 0.5, 0], abs=0.02)


def test_few_prompts_are_refused_and_not_many_warned_of():
    prompts, tokens, agreement, _ = drawn(400)
    with pytest.raises(ValueError, match="needs 100 prompts or more, got 99; from fewer it does"):
        CalibratedRule.fit(prompts[:99], tokens, agreement[:99])
    with pytest.warns(UserWarning, match="100 prompts are few for a calibrated rule"):
        CalibratedRule.fit(prompts[:100], tokens, agreement[:100])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        CalibratedRule.fit(prompts, tokens, agreement)


def test_rows_that_do_not_fit_are_refused():
    prompts, tokens, agreement, _ = drawn(400)
    for wrong in (agreement[:, :2], agreement[:99], agreement * math.nan, agreement * 2):
        with pytest.raises(ValueError, match=r"agreement must be \[400 prompts, 3 budgets\] from"):
            CalibratedRule.fit(prompts, tokens, wrong)
    for wrong in ([8, 4, 16], [0, 4, 8], [4, 4, 8], [4, math.nan, 8]):
        with pytest.raises(ValueError, match="two or more ascending numbers of tokens above 0"):
            CalibratedRule.fit(prompts, wrong, agreement)
    with pytest.raises(ValueError, match="two or more ascending numbers"):
        CalibratedRule.fit(prompts, tokens[:1], agreement[:, :1])
    with pytest.raises(ValueError, match="ridge must be a number above 0, got 0"):
        CalibratedRule.fit(prompts, tokens, agreement, ridge=0)


def test_rules_come_back_from_json():
    prompts, tokens, agreement, _ = drawn(400)
    for rule in (InformationRule(1.5), CalibratedRule.fit(prompts, tokens, agreement)):
        assert rule_from_dict(json.loads(json.dumps(rule.to_dict()))) == rule


@pytest.mark.parametrize(
    ("saved", "said"),
    [
        (None, "kind information or calibrated, got None"),
        ({"kind": "greedy"}, "got 'greedy'"),
        ({"kind": "information"}, r"a saved information rule has \['power'\], got \[\]"),
        ({"kind": "information", "power": -1}, "power must be a number from 0 to 100"),
        (
            {"kind": "calibrated", "tokens": 1, "mean": 1, "scale": 1, "weights": 1},
            "holds lists of numbers",
        ),
        (
            {
                "kind": "calibrated",
                "tokens": [1, 2],
                "mean": [0],
                "scale": [1],
                "weights": [[0, 0]] * 2,
            },
            "a mean and a scale of 5 features",
        ),
        (
            {
                "kind": "calibrated",
                "tokens": [1, 2],
                "mean": [0] * 5,
                "scale": [0] * 5,
                "weights": [[0] * 6] * 2,
            },
            "its scales above 0",
        ),
    ],
)
def test_saved_rules_that_are_none_are_refused(saved, said):
    with pytest.raises(ValueError, match=said):
        rule_from_dict(saved)


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ([[1, 2, 3, 4]], r"shape \[2, 4\], got shape \[1, 4\]"),
        ([1, 2], r"got shape \[2\]"),
        ([[1, 2], [1]], "got a list"),
        (None, r"got shape \[\]"),
        ("many", "got a str"),
        (
            [[1, 2, 3, 4], [1, math.nan, 3, 4]],
            r"finite losses, got \[1.0, nan, 3.0, 4.0\] for prompt 1",
        ),
    ],
)
def test_tables_of_a_function_are_checked(answer, said):
    with pytest.raises(ValueError, match=said):
        predicted(lambda prompts, tokens: answer, [signals(), signals()], TOKENS)
