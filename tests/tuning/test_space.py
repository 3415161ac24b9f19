"""What is searched holds every method's own settings, and only what the methods take."""

from __future__ import annotations

import optuna
import pytest

from autoprune import AutoPrune, Budget, create
from autoprune.tuning.space import SPACE, Choice, Range, Space

BUDGET = Budget.tokens(36)


def test_the_first_trials_are_the_defaults_and_optuna_can_propose_them():
    space = Space.of(BUDGET)
    starts = space.starts()
    assert [space.build(start) for start in starts[: len(SPACE)]] == [
        create(name, BUDGET) for name in SPACE
    ]
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=0))
    for start in starts:
        study.enqueue_trial(start)
        assert space.suggest(study.ask()) == start


def test_every_default_lies_inside_what_is_searched():
    for name, dimensions in Space.of(BUDGET).dimensions.items():
        own = create(name, BUDGET)
        for dimension in dimensions:
            value = getattr(own, dimension.option)
            if isinstance(dimension, Range):
                assert dimension.low <= value <= dimension.high
            else:
                assert value in dimension.values and len(dimension.values) > 1


def test_proposals_differ_and_build():
    space = Space.of(BUDGET)
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=0))
    built = [space.build(space.suggest(study.ask())) for _ in range(60)]
    assert {method.name for method in built} == set(SPACE)
    assert all(method.budget == BUDGET for method in built)
    assert len({method.k0 for method in built if isinstance(method, AutoPrune)}) > 5


def test_an_option_that_means_nothing_beside_another_is_not_decided():
    space = Space.of(BUDGET, ("autoprune",))
    study = optuna.create_study()
    study.enqueue_trial({"method": "autoprune", "autoprune.first_cut": "pre_llm"})
    assert "autoprune.first_ranking" not in space.suggest(study.ask())
    (start,) = [own for own in space.starts() if own["autoprune.first_cut"] == "pre_llm"]
    assert "autoprune.first_ranking" not in start


def test_every_value_is_taken_and_every_form_of_the_summary_is_another_method():
    """A value that a method refuses beside its defaults may go with another option, which a start then has."""
    for name, dimensions in SPACE.items():
        for dimension in dimensions:
            if isinstance(dimension, Choice) and dimension.option != "first_ranking":
                built = [create(name, BUDGET, **{dimension.option: v}) for v in dimension.values]
                assert len(set(map(repr, built))) == len(built)
        mergers = next(own.values for own in dimensions if own.option == "merger")
        forms = {
            str(create(name, BUDGET, merger=own).summary) for own in mergers if own != "dpc_knn"
        }
        assert len(forms) == (6 if name == "autoprune" else 2)
    cuts = {start.get("autoprune.first_cut") for start in Space.of(BUDGET).starts()}
    assert {"after_layer_0", "pre_llm", "peek"} <= cuts


@pytest.mark.parametrize("names", [(), ("vtw",), ("autoprune", "nothing")])
def test_other_methods_are_refused(names):
    with pytest.raises(ValueError, match=r"methods to tune are some of autoprune, fastv"):
        Space.of(BUDGET, names)
