"""The search finds what is good, stops what is bad, and goes on after a kill as if there had been none."""

from __future__ import annotations

import numpy as np
import pytest

from autoprune import Budget
from autoprune.evaluation.answering import Refused
from autoprune.methods.autoprune import AutoPrune
from autoprune.tuning.agreement import Scores
from autoprune.tuning.search import SHARES, Search
from autoprune.tuning.space import Space
from autoprune.tuning.split import PARTS

BUDGET = Budget.tokens(36)
SPACE = Space.of(BUDGET, ("autoprune", "fastv"))


class Model:
    """A stand-in: agreement falls with the distance from the right settings."""

    def __init__(self, merger_gain=-0.2, best_x0=9.0, kill_at=None):
        self.merger_gain, self.best_x0, self.kill_at = merger_gain, best_x0, kill_at
        self.asked = []

    def __call__(self, method, part):
        self.asked.append((method, part))
        if len(self.asked) == self.kill_at:
            raise SystemExit("killed")
        if not isinstance(method, AutoPrune):
            raise Refused("another method")
        value = 0.8 - abs(method.x0 - self.best_x0) / 40
        value += self.merger_gain * (method.merger is not None)
        same = np.full(25, value)
        return Scores(same, 1 - same, same, same, same)


def search(folder, model, trials=30, seed=0):
    done = []
    found = Search(SPACE, model, folder / "study.db", seed)
    found.run(trials, done.append)
    assert done == found.trials
    return found


@pytest.mark.parametrize("gain", [-0.2, 0.2])
def test_what_becomes_of_dropped_tokens_follows_the_model(tmp_path, gain):
    """No merger where it hurts, and one where it helps."""
    best = search(tmp_path, Model(merger_gain=gain), trials=30).best
    assert (best.candidate["autoprune.merger"] is not None) == (gain > 0)
    assert abs(best.candidate["autoprune.x0"] - 9) < 4


def test_bad_trials_stop_at_a_share_of_the_prompts(tmp_path):
    model = Model()
    trials = search(tmp_path, model).trials
    assert [part for parts in SHARES for part in parts] == list(range(PARTS))
    stopped = [trial for trial in trials if trial.state == "stopped"]
    complete = [trial for trial in trials if trial.state == "complete"]
    assert stopped and complete
    assert {trial.prompts for trial in complete} == {100}
    assert {trial.prompts for trial in stopped} <= {25, 50}
    # The defaults of both methods come first; fastv cannot run here.
    assert (trials[0].state, trials[1].state) == ("complete", "refused")
    assert trials[1].reason == "another method" and trials[1].value is None
    assert len(model.asked) < 4 * 30


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A search of 20 trials that nothing interrupted."""
    return search(tmp_path_factory.mktemp("whole"), Model(), 20)


@pytest.mark.parametrize("kill_at", [1, 6, 37])
def test_a_killed_search_goes_on_to_the_same_result(whole, tmp_path, kill_at):
    with pytest.raises(SystemExit):
        search(tmp_path, Model(kill_at=kill_at), 20)
    again = search(tmp_path, Model(), 20)
    assert again.trials == whole.trials
    assert again.best == whole.best
    # More trials continue the same study.
    assert search(tmp_path, Model(), trials=22).trials[:20] == whole.trials
    idle = Model()
    search(tmp_path, idle, trials=22)
    assert idle.asked == []


def test_the_seed_decides_what_is_proposed(tmp_path):
    (tmp_path / "other").mkdir()
    first = [trial.candidate for trial in search(tmp_path, Model(), 12).trials]
    other = [trial.candidate for trial in search(tmp_path / "other", Model(), 12, seed=1).trials]
    assert first[:2] == other[:2] and first != other


def test_nothing_that_can_run_is_said_with_the_reason(tmp_path):
    def refuse(method, part):
        raise Refused("too small a budget")

    found = Search(SPACE, refuse, tmp_path / "study.db", 0)
    found.run(3)
    with pytest.raises(Refused, match=r"no settings can run .* too small a budget"):
        _ = found.best


def test_no_settings_are_tried_twice_while_there_are_others(tmp_path):
    """fastv and uniform have ten settings between them, and one of these is the best by far."""
    space = Space.of(BUDGET, ("fastv", "uniform"))

    def ask(method, part):
        best = method.name == "uniform" and method.merger is None
        same = np.full(25, 0.9 if best else 0.3)
        return Scores(same, 1 - same, same, same, same)

    found = Search(space, ask, tmp_path / "study.db", 0)
    found.run(10)
    candidates = [trial.candidate for trial in found.trials]
    assert all(candidates.count(own) == 1 for own in candidates)
    found.run(12)
    assert len(found.trials) == 12
