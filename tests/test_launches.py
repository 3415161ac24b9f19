"""What a prefill launches is what docs/speed.md says: the committed counts, to 5 %."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
COMMITTED = json.loads((ROOT / "benchmarks/results/launches.json").read_text())["launches"]

spec = importlib.util.spec_from_file_location("launches", ROOT / "benchmarks/launches.py")
launches = importlib.util.module_from_spec(spec)


@pytest.fixture(scope="module")
def counted():
    import sys

    sys.modules["launches"] = launches
    spec.loader.exec_module(launches)
    # The case of 2880 tokens launches what that of 576 does, and takes longer.
    cases = {name: case for name, case in launches.CASES.items() if case[1] == 1}
    count = launches.count

    def count_two(model, inputs, method):
        """Eight plain prompts launch what two do, and take longer."""
        few = inputs if method else {name: values[:2] for name, values in inputs.items()}
        return count(model, few, method)

    launches.count = count_two
    try:
        return launches.measure(cases)
    finally:
        launches.count = count


def test_launches_are_those_that_were_committed(counted):
    assert set(counted) <= set(COMMITTED)
    for name, row in counted.items():
        for key in ("plain", "pruned"):
            assert row[key] == pytest.approx(COMMITTED[name][key], rel=0.05), (name, key)
        assert row["copies"] <= COMMITTED[name]["copies"], name
        assert row["step added"] <= 0, name


def test_ranking_less_often_launches_less(counted):
    alone = "batch 1, 64 of 576"
    every, once = counted[f"{alone}, ranked every cut"], counted[f"{alone}, ranked once"]
    assert once["pruned"] < counted[alone]["pruned"] < every["pruned"]
    assert counted[alone]["ratio"] < 1.155


def test_a_cut_that_follows_from_a_ranking_is_one_operation(counted):
    model, inputs = launches.build(), launches.prompts(1, 1)
    many, few = (
        launches.count(model, inputs, launches.GivenInformation(64, rank_every=32, cut_every=every))
        for every in (1, 8)
    )
    assert many["cuts"] > few["cuts"] + 20
    assert many["operations"] - few["operations"] == many["cuts"] - few["cuts"]


def test_a_case_of_many_tokens_was_counted_too():
    small, large = (COMMITTED[f"batch 1, {n}"] for n in ("64 of 576", "320 of 2880"))
    assert small["pruned"] == pytest.approx(large["pruned"], rel=0.02)
