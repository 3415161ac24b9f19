"""`autoprune plan` shows schedules without a model."""

from __future__ import annotations

import subprocess
import sys

import pytest
from PIL import Image

from autoprune.commands.plan import _label


def test_every_schedule_spends_the_budget(call):
    record = call("plan", "--budget", 64, "--mi", 0.5, "--compare-mi", "0.1,1.0", "--json").record
    assert [s["mutual_information"] for s in record["schedules"]] == [0.5, 0.1, 1.0]
    for schedule in record["schedules"]:
        counts = schedule["tokens_per_layer"]
        assert len(counts) == 32
        assert sum(counts) == 32 * 64
        assert counts == sorted(counts, reverse=True)


def test_the_hard_prompt_is_kept_whole_early_and_the_easy_one_deep_down(call):
    record = call("plan", "--mi", 0.1, "--compare-mi", "1.0", "--json").record
    hard, easy = (schedule["tokens_per_layer"] for schedule in record["schedules"])
    assert hard[5] > easy[5]
    assert hard[-1] < easy[-1]


def test_several_schedules_say_which_one_is_the_hard_prompts(call):
    words = ("plan", "--layers", 8, "--visual", 100, "--budget", "1/4", "--mi", 0.1)
    legend = "Much information is an easy prompt: pruned hard early, then held."
    assert legend in call(*words, "--compare-mi", "1.0").out
    assert legend not in call(*words).out


def test_the_plot_marks_the_hardest_and_the_easiest_prompt():
    labels = [_label(value, [0.5, 0.1, 1.0]) for value in (0.5, 0.1, 1.0)]
    assert labels == ["0.5 bits", "0.1 bits (hardest)", "1 bits (easiest)"]
    assert _label(0.5, [0.5]) == "0.5 bits"


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
    ("convention", "stated", "entering", "back"),
    [
        ("fastv", 64, 96, (32 * 64 - 2 * 576) / 30),
        ("pdrop", 270, 270, 270),
        ("sparsevlm", 192, 206.5, None),
        ("visionzip", 64, 64, 64),
        ("entering", 64, 64, 64),
    ],
)
def test_a_published_setting_is_planned_at_what_it_really_costs(
    call, convention, stated, entering, back
):
    words = ("plan", "--convention", convention, "--budget", stated)
    record = call(*words, "--json").record
    converted = record["convention"]
    assert converted["readings"]["entering"] == pytest.approx(entering)
    assert record["schedules"][0]["mean_tokens"] == pytest.approx(round(32 * entering) / 32)
    if back is not None:
        assert converted["stated_for_as_many_entering"] == pytest.approx(back)
    assert (
        f"{stated} tokens by the count of {convention}: {entering:.6g} enter a layer"
        in call(*words).out
    )


def test_a_mean_of_leaving_tokens_is_read_off_the_schedule(call):
    record = call("plan", "--convention", "leaving", "--budget", 64, "--json").record
    counts = record["schedules"][0]["tokens_per_layer"]
    assert sum(counts[1:]) + counts[-1] == 32 * 64
    found = record["convention"]
    assert found["readings"]["leaving"] == 64
    assert found["readings"]["entering"] == sum(counts) / 32 == 64 + (576 - counts[-1]) / 32
    # As many entering leave 64 - (576 - n_31) / 32, with the n_31 of that schedule.
    plain = call("plan", "--budget", 64, "--json").record["schedules"][0]["tokens_per_layer"]
    assert found["stated_for_as_many_entering"] == 64 - (576 - plain[-1]) / 32


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
        (("--convention", "dart"), "unknown convention 'dart'; choose one of"),
        (("--convention", "fastv", "--budget", "1/9"), "converts a number of tokens"),
        (("--convention", "pdrop", "--budget", 64), "a quarter of which is 144"),
        (
            ("--convention", "fastv", "--layers", 0),
            "num_layers must be a whole number, 1 or more, got 0",
        ),
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
