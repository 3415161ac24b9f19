"""Which way difficulty runs on the embedded model, from the committed results of a comparison."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "benchmarks" / "difficulty.py"


@pytest.fixture(scope="module")
def found():
    described = runpy.run_path(str(SCRIPT))["described"]
    return {budget: described(budget) for budget in ("36", "24", "16")}


def test_counting_is_hardest_and_has_the_least_information(found):
    for one in found.values():
        kinds = one["kinds"]
        assert min(kinds, key=lambda kind: kinds[kind]["information"]) == "count"
        for method in ("autoprune", "fixed"):
            assert max(kinds, key=lambda kind: kinds[kind][f"lost by {method}"]) == "count"
            # Less information goes with lower accuracy and larger losses.
            correlations = one["rank_correlation_with_information"]
            assert correlations[method] > 0 > correlations[f"lost by {method}"]


def test_the_page_and_the_committed_file_say_what_is_computed(found):
    committed = json.loads((ROOT / "benchmarks" / "results" / "difficulty.json").read_text())
    for one in committed["budgets"]:
        own = {name: value for name, value in one.items() if name != "questions"}
        assert own == found[one["budget"]]
    page = (ROOT / "docs" / "comparison.md").read_text(encoding="utf-8")
    kinds = found["16"]["kinds"]
    for row, name in (("information", "information"), ("unpruned", "whole"), ("fixed", "fixed")):
        ordered = sorted(kinds.values(), key=lambda own: own["information"])
        cells = [f"{own[name]:.3f}".removeprefix("0") for own in ordered]
        assert f"| {row} | {' | '.join(cells)} |" in page
    for label, name in (
        ("accuracy of `autoprune`", "autoprune"),
        ("what `autoprune` loses", "lost by autoprune"),
    ):
        cells = [
            f"{one['rank_correlation_with_information'][name]:+.2f}".replace("0.", ".")
            for one in found.values()
        ]
        assert f"| {label} | {' | '.join(cells)} |" in page


def test_ranks_share_their_mean():
    script = runpy.run_path(str(SCRIPT))
    assert script["rank_correlation"]([1, 2, 3], [10, 30, 90]) == pytest.approx(1)
    assert script["rank_correlation"]([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)
    # Ranks 1, 2.5, 2.5 against 1, 2, 3.
    assert script["rank_correlation"]([1, 2, 3], [5, 7, 7]) == pytest.approx(0.75**0.5)
