"""The second benchmark model's tables and its attention profile, on numbers worked out by hand."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from autoprune import AutoPrune
from autoprune.evaluation import Setting
from autoprune.evaluation.settings import REFERENCE

FOLDER = Path(__file__).parents[1] / "benchmarks" / "second_model"
MODULES = ("scenes", "questions", "model", "compare", "attention_profile")


@pytest.fixture(scope="module")
def second():
    """The folder's modules by name."""
    sys.path.insert(0, str(FOLDER))
    try:
        yield {name: __import__(name) for name in MODULES}
    finally:
        sys.path.remove(str(FOLDER))
        for name in MODULES:
            sys.modules.pop(name, None)


def records(right, kinds="aaab", divergence=0.0, entering=144.0):
    """What a setting answered, one digit a question."""
    return [
        {
            "kind": kind,
            "accuracy": float(one),
            "agreement": float(one),
            "divergence": divergence,
            "entering": entering,
            "flops": 10 * entering,
        }
        for kind, one in zip(kinds, right, strict=True)
    ]


def test_accuracy_is_the_mean_over_kinds_and_differences_are_to_autoprune_at_the_same_budget(
    second,
):
    settings = list(
        second["compare"].settings_of(
            "autoprune,s@autoprune:merger=summary strength=0.5", "1/9,1/18"
        )
    )
    given = [records("1111"), records("1101"), records("1000", divergence=0.5, entering=36.0)]
    found = dict(zip([REFERENCE, *settings[:2]], given, strict=True))
    found |= {settings[2]: "too small", settings[3]: records("0000")}
    table = second["compare"].rows(found)
    full, plain, summary, refused, alone = table
    assert full["accuracy"] == [1.0, None, None]
    # Two of three of one kind, and one of one of the other.
    assert plain["accuracy"][0] == pytest.approx((2 / 3 + 1) / 2, abs=1e-4)
    assert summary["accuracy_difference"][0] == pytest.approx((1 / 3 + 0) / 2 - 5 / 6, abs=1e-4)
    assert summary["divergence_difference"][0] == 0.5
    assert (summary["entering"], summary["flops_share"]) == (36.0, 0.25)
    assert summary["by_kind"] == {"a": 0.3333, "b": 0.0}
    assert refused == {"method": "autoprune", "budget": "1/18", "refused": "too small"}
    # AutoPrune itself could not run there.
    assert "accuracy_difference" not in alone
    assert "too small" in second["compare"].line(refused)


def test_settings_go_budget_by_budget_and_keep_what_a_method_refuses(second):
    settings = list(
        second["compare"].settings_of("autoprune,t@autoprune:first_ranking=text", "1/9,1/4")
    )
    assert [(s.label, s.budget) for s in settings] == [
        ("autoprune", "1/9"),
        ("t", "1/9"),
        ("autoprune", "1/4"),
        ("t", "1/4"),
    ]
    assert settings[3].method.first_ranking == "text"


def test_shares_of_attention_are_those_of_the_rows_behind_the_picture(second):
    # One layer, two heads, tokens: first, visual, visual, text, text.
    rows = torch.zeros(1, 2, 5, 5)
    rows[0, :, :3, 0] = 1.0  # what stands before the text does not count
    rows[0, 0, 3] = torch.tensor([0.4, 0.1, 0.3, 0.2, 0.0])
    rows[0, 0, 4] = torch.tensor([0.2, 0.1, 0.5, 0.1, 0.1])
    rows[0, 1, 3] = torch.tensor([0.0, 0.5, 0.1, 0.4, 0.0])
    rows[0, 1, 4] = torch.tensor([0.2, 0.3, 0.3, 0.1, 0.1])
    visual = torch.tensor([False, True, True, False, False])
    shares = second["attention_profile"].shares(rows, visual)
    wanted = {"first": 0.2, "visual": 0.55, "text": 0.25, "strongest": 0.3}
    assert {name: round(float(share), 6) for name, share in shares.items()} == wanted


def test_an_answer_that_was_written_is_not_asked_for_again(second, tmp_path):
    class Asked(second["compare"].Answering):
        def __init__(self):
            self.folder, self.calls = tmp_path, []
            self.batches = [type("Batch", (), {"tasks": [0, 1]}), type("Batch", (), {"tasks": [2]})]

        def ask(self, setting, index, batch):
            self.calls.append(index)
            if len(self.calls) == 2:
                raise KeyboardInterrupt
            return [{"index": index}] * len(batch.tasks)

    setting, asked = Setting("autoprune", "1/9", AutoPrune(16)), Asked()
    with pytest.raises(KeyboardInterrupt):
        asked.records(setting)
    assert asked.records(setting) == [{"index": 0}, {"index": 0}, {"index": 1}]
    assert asked.calls == [0, 1, 1]
