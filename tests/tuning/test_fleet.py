"""The rule of a fleet: what it is told, what it is fitted to, and that it is taken only where it pays."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch

from autoprune import AutoPrune, Budget, load_method, tiny
from autoprune.evaluation.batches import prepare
from autoprune.evaluation.statistics import Estimate
from autoprune.policy.rules import QUESTION, CalibratedRule, Signals
from autoprune.tuning import Options, built_in_prompts, tune
from autoprune.tuning.agreement import Scores
from autoprune.tuning.fleet import (
    CALIBRATED,
    LEVELS,
    TakingTurns,
    find_rules,
    open_to_all_layers,
    shared,
)
from autoprune.tuning.judgement import SAME, Judged, choose_rule
from autoprune.tuning.signals import signals

METHOD = AutoPrune(8, first_cut="peek", merger="summary")


@pytest.fixture(scope="module")
def loaded():
    return tiny.load()


@pytest.fixture(scope="module")
def prompts():
    return built_in_prompts(20)


def test_signals_are_what_a_prompt_shows_alone(loaded, prompts):
    model, processor = loaded
    (batch,) = prepare(model, processor, prompts[:5], 5, by_length=False)
    found = signals(model, METHOD, batch)
    for task, own in zip(batch.tasks, found, strict=True):
        (alone,) = prepare(model, processor, [task], 1)
        states = []
        # Layer 2 is the first behind the measurement; a cut puts other tokens before the text alone.
        hook = model.model.language_model.layers[1].register_forward_hook(
            lambda layer, args, out, states=states: states.append(
                out[0] if isinstance(out, tuple) else out
            )
        )
        with METHOD(model) as trace, torch.no_grad():
            inputs = alone.inputs()
            model(**inputs)
        hook.remove()
        sample = trace.samples[0]
        assert own.information == pytest.approx(sample.mutual_information, abs=1e-4)
        assert (own.num_visual, own.num_text) == (sample.num_visual, sample.num_text)
        assert own.own_tokens == pytest.approx(np.mean(sample.schedule[2:]))
        behind = inputs["input_ids"].shape[1] - 1 - int(sample.visual_positions[-1])
        mean = states[0][0, -behind:].mean(0)
        # 128 numbers in 64: the mean of two neighbours.
        expected = mean.view(QUESTION, 2).mean(1).tolist()
        assert own.question == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("over", ["prompt", "batch"])
def test_prompts_that_share_a_budget_stay_in_mixed_order(loaded, over, tmp_path, monkeypatch):
    from autoprune.evaluation import Options as Comparing
    from autoprune.evaluation import Setting, compare, comparison, embedded_tasks

    seen, whole = [], comparison.prepare

    def spy(*arguments, **options):
        seen.extend(whole(*arguments, **options))
        return seen

    monkeypatch.setattr(comparison, "prepare", spy)
    tasks = embedded_tasks(1)
    method = AutoPrune(Budget.tokens(24, over=over))
    options = Comparing(batch_size=3, timing=False)
    compare(*loaded, [Setting("a", "24", method)], tasks, tmp_path / "run", options)
    asked = [task.id for batch in seen for task in batch.tasks]
    assert (asked == [task.id for task in tasks]) == (over == "batch")


class Part:
    """Prompts of two kinds: those with a positive first number need more than they get alone."""

    def __init__(self, number, seed):
        random = np.random.default_rng(seed)
        self.hard = random.integers(0, 2, number).astype(bool)
        self.places = np.arange(number) % 50
        self._signals = [
            Signals(1.0, 8.0, 3.0, 144, 20, 8.0, (1.0 if own else -1.0, random.normal()))
            for own in self.hard
        ]

    def signals(self, method):
        return self._signals


def scores_of(agreement):
    rest = np.zeros(len(agreement))
    return Scores(np.asarray(agreement, float), rest, rest, rest, rest)


def test_who_looks_ahead_shares_from_layer_0_on():
    ahead = open_to_all_layers(METHOD)
    assert ahead == dataclasses.replace(METHOD, mi_layer="peek")
    later = AutoPrune(8, first_cut="pre_llm")
    assert open_to_all_layers(later) == later


def test_levels_are_given_in_turn_and_take_what_the_budget_has():
    assert np.mean(LEVELS) == pytest.approx(1)
    tokens = np.exp2(np.arange(0, 60) / 8)
    prompts = Part(6, 0).signals(None)
    for turn in range(6):
        lost = TakingTurns(turn)(prompts, tokens)
        wanted = 8.0 * np.roll(LEVELS, -turn)
        assert tokens[lost.argmin(1)] == pytest.approx(wanted, rel=0.05)


def test_a_rule_is_compared_on_prompts_it_was_not_fitted_to():
    parts, asked = [Part(110, seed) for seed in range(3)], []

    def ask(method, part):
        rule = method.fleet.rule
        asked.append(rule)
        assert method.budget == Budget.tokens(8, over="batch")
        if isinstance(rule, TakingTurns):
            level = np.array(LEVELS)[(parts[part].places + rule.turn) % 6]
            return scores_of(~parts[part].hard | (level > 1))
        return scores_of(np.full(110, isinstance(rule, CalibratedRule)))

    found = find_rules(METHOD, parts, ask)
    assert found.best == CALIBRATED and found.values[CALIBRATED] == 1
    rules = [rule for rule in asked if isinstance(rule, CalibratedRule)]
    whole = found.by_label[CALIBRATED]
    assert len({repr(rule) for rule in [*rules, whole]}) == 4
    assert whole.tokens == pytest.approx([8 * level for level in LEVELS])
    for part, rule in enumerate(rules):
        others = [own for i, own in enumerate(parts) if i != part]
        told = [own for other in others for own in other.signals(None)]
        hard = np.concatenate([other.hard for other in others])
        agreement = np.stack([~hard | (level > 1) for level in LEVELS], axis=1)
        assert rule == CalibratedRule.fit(told, whole.tokens, agreement)
    lost = whole(parts[0].signals(None), np.array(whole.tokens[:1]))[:, 0]
    assert lost[parts[0].hard].min() > 0.8 > 0.2 > lost[~parts[0].hard].max()


def test_too_few_prompts_have_information_rules_alone():
    parts = [Part(30, seed) for seed in range(3)]
    found = find_rules(METHOD, parts, lambda method, part: scores_of(np.ones(30)))
    assert CALIBRATED not in found.by_label and len(found.by_label) == 3


def judged(label, low, high):
    return Judged(label, METHOD, Estimate(0.9, 0.8, 1.0), Estimate((low + high) / 2, low, high))


def test_a_rule_is_taken_only_if_its_whole_interval_is_above_zero():
    same = dataclasses.replace(judged(SAME, 0, 0), difference=None)
    for low, label in ((0.01, "rule"), (0.0, SAME), (-0.01, SAME)):
        chosen, said = choose_rule([same, judged("rule", low, 0.03)], "rule")
        assert chosen.label == label and f"{100 * low:+.1f}" in said
    refused = Judged("rule", METHOD, reason="no room")
    assert choose_rule([same, refused], "rule")[0] is same


def test_a_search_with_a_fleet_writes_a_file_that_shares_its_budget(
    loaded, prompts, tmp_path, monkeypatch
):
    from autoprune.tuning import tuning

    # Ten prompts show nothing beyond chance: take the rule that was best.
    monkeypatch.setattr(
        tuning, "choose_rule", lambda own, best: (next(j for j in own if j.label == best), "won")
    )
    options = Options(trials=2, methods=("autoprune",), new_tokens=8, timing=False)
    result = tune(*loaded, prompts, Budget.tokens(24, over="batch"), tmp_path / "run", options)
    assert [own.label for own in result.rules] == [
        SAME,
        *(f"information, power {power}" for power in ("0.5", "1", "2")),
    ]
    assert all(own.entering == pytest.approx(24) for own in result.rules)
    assert all(trial.entering == 24 for trial in result.trials)
    assert result.verdict.endswith("; won")
    result.file.write(tmp_path / "tuned.json")
    method = load_method(tmp_path / "tuned.json")
    assert method.budget == Budget.tokens(24, over="batch")
    assert method.fleet.rule == result.chosen.method.fleet.rule
    method(loaded[0])
    with pytest.raises(ValueError, match="tune that, and take what is found for a stream"):
        tune(*loaded, prompts, Budget.tokens(24, over="stream"), tmp_path / "other", options)


def test_a_calibrated_rule_is_kept_in_the_file(loaded, prompts, tmp_path):
    from autoprune.methods.tuned_file import ModelIdentity, TunedFile, settings_of

    part = Part(120, 0)
    rule = CalibratedRule.fit(part.signals(None), [8.0, 16.0], np.stack([~part.hard, part.hard], 1))
    method = shared(METHOD, rule)
    path = tmp_path / "tuned.json"
    identity = ModelIdentity.of(loaded[0])
    TunedFile("autoprune", method.budget, settings_of(method), identity, {}, {}, "1").write(path)
    again = AutoPrune.load(path)
    assert again.fleet.rule == rule and repr(again) == repr(method)
    record = json.loads(path.read_text())
    record["settings"]["fleet"]["rule"]["kind"] = "none"
    path.write_text(json.dumps(record))
    with pytest.raises(ValueError, match="a saved rule is of kind information or calibrated"):
        AutoPrune.load(path)
