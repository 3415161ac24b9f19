"""`autoprune run` answers at the price that was asked for, and says what it did."""

from __future__ import annotations

import io
import re
from types import SimpleNamespace

import pytest
import torch
import transformers
from PIL import Image

import autoprune
from tests.cli.conftest import LAYERS, VISUAL


@pytest.mark.parametrize(
    ("budget", "total"), [("30", 30 * LAYERS), ("1/3", 48 * LAYERS), ("25%", 36 * LAYERS)]
)
def test_the_budget_is_spent_exactly(ask, budget, total):
    record = ask("--budget", budget, "--json").record
    assert sum(record["tokens_per_layer"]) == total
    assert record["tokens_per_layer"][0] == record["num_visual"] == VISUAL
    assert record["tokens_per_layer"] == record["schedule"]


def test_json_holds_the_answer_and_the_whole_record(ask):
    outcome = ask("--json")
    record = outcome.record
    assert outcome.err == ""
    assert record["flops"] < record["flops_full"]
    assert record["kv_bytes"] < record["kv_bytes_full"]
    assert record["mutual_information"] >= 0
    assert [len(kept) for kept in record["kept"]] == record["tokens_per_layer"]
    assert isinstance(record["answer"], str)


def test_the_table_names_method_budget_and_savings(ask):
    outcome = ask("--compare")
    assert outcome.code == 0
    for words in (
        "unpruned",
        "autoprune, 30 visual tokens per layer",
        "30 of 144 per layer: 144",
        "saved",
    ):
        assert words in outcome.out


def test_a_budget_of_all_tokens_changes_nothing_and_says_so(ask):
    outcome = ask("--budget", VISUAL, "--compare")
    assert "nothing was pruned" in outcome.out
    answers = [line.split(None, 1)[1] for line in outcome.out.splitlines()[:2]]
    assert answers[0] == answers[1]


def test_the_original_flags_reach_the_released_method(ask):
    flags = ("--x0", 3, "--k0", 0.8, "--gamma", 0.1, "--method", "autoprune_reference", "--json")
    changed = ask("--target-token-num", 20, *flags).record
    default = ask("--target-token-num", 20, *flags[-3:]).record
    assert changed["method"] == default["method"] == "autoprune_reference"
    assert "leaving" in default["budget"]
    assert changed["tokens_per_layer"] != default["tokens_per_layer"]


def test_set_reaches_any_option_of_the_method(ask):
    record = ask("--set", "first_cut=pre_llm", "--set", "mi_layer=2", "--json").record
    assert max(record["tokens_per_layer"]) < VISUAL


def test_the_picture_shows_four_panels(ask, tmp_path):
    path = tmp_path / "kept.png"
    record = ask("--picture", path, "--json").record
    assert record["picture"] == str(path)
    with Image.open(path) as image:
        assert image.width > 3 * image.height
    assert [p.name for p in tmp_path.iterdir()] == ["kept.png"]


def test_the_same_call_gives_the_same_record(ask):
    first, second = ask("--json").record, ask("--json").record
    for name in ("seconds", "first_token_seconds"):
        assert first.pop(name) > 0 and second.pop(name) > 0
    assert first == second


def test_json_says_what_ran_on_what(ask, picture):
    record = ask("--json", "--compare").record
    assert record["image"] == str(picture) and record["image_size"] == [96, 96]
    assert record["versions"] == {
        "autoprune": autoprune.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    assert (record["device"], record["dtype"]) == ("cpu", "float32")
    for end in ("", "_unpruned"):
        assert 0 < record[f"first_token_seconds{end}"] <= record[f"seconds{end}"]


def test_times_stand_beside_flops(ask):
    lines = ask("--compare").out.splitlines()
    (row,) = (line for line in lines if line.startswith("time "))
    assert re.search(r"first token after [\d.]+ s, answer after [\d.]+ s", row)
    assert any("unpruned: first token after" in line for line in lines)


@pytest.mark.parametrize(
    "question", ["-1? how many rings?", "-1?", "--how many = rings?", "- a list\n- of two"]
)
def test_a_question_may_begin_with_a_dash(ask, question):
    assert ask("--json", question=question).record["question"] == question


def test_what_looks_like_an_option_is_one_unless_it_stands_behind_two_dashes(
    call, picture, model_folder
):
    fixed = ("--budget", 30, "--model", model_folder, "--max-new-tokens", 2)
    refused = call("run", picture, "-colour", *fixed)
    assert refused.code == 2 and "No such option" in refused.err
    record = call("run", *fixed, "--json", "--", picture, "-colour").record
    assert record["question"] == "-colour"


def test_a_picture_comes_from_standard_input(call, picture, model_folder, monkeypatch):
    stream = SimpleNamespace(buffer=io.BytesIO(picture.read_bytes()), isatty=lambda: False)
    monkeypatch.setattr("sys.stdin", stream)
    words = ("--budget", 30, "--model", model_folder, "--max-new-tokens", 2, "--json")
    piped = call("run", "-", "is there a red ring?", *words).record
    named = call("run", picture, "is there a red ring?", *words).record
    assert piped["image"] == "-"
    assert (piped["answer"], piped["kept"]) == (named["answer"], named["kept"])
