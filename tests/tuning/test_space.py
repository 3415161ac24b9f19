"""What is searched holds every method's own settings, and only what the methods take."""

from __future__ import annotations

import dataclasses

import optuna
import pytest

from autoprune import AutoPrune, Budget, create
from autoprune.tuning import space as spaces
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


def test_proposals_differ_and_build(monkeypatch):
    space = Space.of(BUDGET)
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=0))
    built = [space.build(space.suggest(study.ask())) for _ in range(60)]
    assert {method.name for method in built} == set(SPACE)
    assert all(method.budget == BUDGET for method in built)
    assert len({method.k0 for method in built if isinstance(method, AutoPrune)}) > 5


def test_what_a_release_lacks_is_left_out(monkeypatch):
    extra = (
        Choice("merger", (None, "dpc_knn", "none_such")),
        Choice("none_such", (1, 2)),
        Range("text_weight", 0.5, 2.0, when={"first_cut": ("after_layer_0",)}),
    )
    first = Choice("first_cut", ("after_layer_0", "pre_llm"))
    monkeypatch.setitem(spaces.SPACE, "autoprune", (first, *extra))
    space = Space.of(BUDGET, ("autoprune",))
    assert [own.option for own in space.dimensions["autoprune"]] == [
        "first_cut",
        "merger",
        "text_weight",
    ]
    assert space.dimensions["autoprune"][1].values == (None, "dpc_knn")
    # An option that means nothing beside another is not decided.
    study = optuna.create_study()
    study.enqueue_trial({"method": "autoprune", "autoprune.first_cut": "pre_llm"})
    assert "autoprune.text_weight" not in space.suggest(study.ask())


def test_a_fleet_searches_over_what_the_budget_is_a_mean():
    if "over" not in {field.name for field in dataclasses.fields(Budget)}:
        with pytest.raises(ValueError, match="leave out the fleet"):
            Space.of(BUDGET, fleet=True)
        return
    space = Space.of(BUDGET, fleet=True)
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=0))
    built = [space.build(space.suggest(study.ask())) for _ in range(40)]
    assert {method.budget.over for method in built} == {"prompt", "batch", "stream"}


@pytest.mark.parametrize("names", [(), ("vtw",), ("autoprune", "nothing")])
def test_other_methods_are_refused(names):
    with pytest.raises(ValueError, match=r"methods to tune are some of autoprune, fastv"):
        Space.of(BUDGET, names)
