"""`autoprune plan` shows schedules without a model."""

from __future__ import annotations

import subprocess
import sys

import pytest
from PIL import Image


def test_every_schedule_spends_the_budget(call):
    record = call("plan", "--budget", 64, "--mi", 0.5, "--compare-mi", "0.1,1.0", "--json").record
    assert [s["mutual_information"] for s in record["schedules"]] == [0.5, 0.1, 1.0]
    for schedule in record["schedules"]:
        counts = schedule["tokens_per_layer"]
        assert len(counts) == 32
        assert sum(counts) == 32 * 64
        assert counts == sorted(counts, reverse=True)


def test_more_information_keeps_more_tokens_deep_down(call):
    record = call("plan", "--mi", 0.1, "--compare-mi", "1.0", "--json").record
    easy, hard = (schedule["tokens_per_layer"][-1] for schedule in record["schedules"])
    assert hard > easy


def test_the_table_has_a_row_per_layer_and_the_sum(call):
    out = call("plan", "--layers", 8, "--visual", 100, "--budget", "1/4").out
    assert all(f" {layer} " in out for layer in range(8))
    assert "200" in out.splitlines()[-2]


def test_options_reach_the_curve(call):
    default = call("plan", "--json").record
    steep = call("plan", "--json", "--k0", 1.5, "--gamma", 0, "--x0", 8).record
    linear = call("plan", "--json", "--curve", "linear").record
    flat = call("plan", "--json", "--set", "first_cut=pre_llm", "--curve", "constant").record
    shapes = {tuple(r["schedules"][0]["tokens_per_layer"]) for r in (default, steep, linear, flat)}
    assert len(shapes) == 4
    assert flat["schedules"][0]["tokens_per_layer"] == [64] * 32


def test_the_plot_is_written(call, tmp_path):
    path = tmp_path / "plan.png"
    assert str(path) in call("plan", "--output", path, "--compare-mi", "0.1").out.replace("\n", "")
    with Image.open(path) as image:
        assert image.width > 600
    assert [p.name for p in tmp_path.iterdir()] == ["plan.png"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--layers", 0), "at least 1"),
        (("--visual", -3), "at least 1"),
        (("--text", -1), "at least 0"),
        (("--layers", 10**8), "at most 10000 layers"),
        (("--visual", 10**20), "at most 10000 layers and 100000000 tokens of a kind, got 32, 1000"),
        (("--mi", -1), "finite and at least 0 bits, got -1"),
        (("--mi", "nan"), "finite and at least 0 bits"),
        (("--compare-mi", "0.1,much"), "numbers separated by commas"),
        (("--budget", 10), "smallest feasible budget"),
        (("--curve", "zigzag"), "unknown curve"),
        (("--output", "plan.txt"), "PNG"),
        (("--output", "no/plan.png"), "there is no folder"),
    ],
)
def test_numbers_that_do_not_fit(call, words, message):
    outcome = call("plan", *words)
    assert outcome.code == 2
    assert outcome.err.startswith("autoprune: ")
    assert outcome.err.count("\n") == 1
    assert message in outcome.err


def test_output_survives_a_terminal_without_block_characters():
    done = subprocess.run(
        [sys.executable, "-m", "autoprune", "plan", "--layers", "4", "--budget", "200"],
        env={"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0", "PATH": ""},
        capture_output=True,
        check=True,
    )
    assert b"576 ####" in done.stdout
