"""A search picks no summary where the summary hurts."""

from __future__ import annotations

from autoprune import AutoPrune, Budget, load_method, tiny
from autoprune.tuning import Options, built_in_prompts, tune, tuning
from autoprune.tuning import space as spaces
from autoprune.tuning.space import Choice

# Weighing far more than the tokens it stands for, it takes the attention from those that are kept.
HURTS = "summary strength=4"


def test_the_search_picks_no_summary_where_it_hurts(tmp_path, monkeypatch):
    monkeypatch.setitem(spaces.SPACE, "autoprune", (Choice("merger", (None, HURTS)),))
    monkeypatch.setattr(spaces, "STARTS", ({"merger": HURTS},))
    monkeypatch.setattr(tuning, "SPACE", {"autoprune": ()})
    options = Options(trials=2, methods=("autoprune",), new_tokens=8, timing=False)
    model, processor = tiny.load()
    budget = Budget.tokens(16)
    result = tune(model, processor, built_in_prompts(40), budget, tmp_path / "run", options)
    agreement = {trial.candidate["autoprune.merger"]: trial.agreement for trial in result.trials}
    # It truly hurts: by far more than a few answers.
    assert agreement[HURTS] < agreement[None] - 0.1
    result.file.write(tmp_path / "tuned.json")
    assert load_method(tmp_path / "tuned.json") == AutoPrune(budget)
