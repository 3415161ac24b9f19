"""`autoprune demo` asks the embedded model about a drawn picture, whole and pruned."""

from __future__ import annotations

import pytest
from PIL import Image

from autoprune import tiny
from autoprune.commands import demo


@pytest.fixture
def random_weights(monkeypatch, model_folder):
    monkeypatch.setattr(tiny, "path", lambda: model_folder)
    monkeypatch.setattr(demo, "MAX_NEW_TOKENS", 3)


def test_one_question_of_each_kind(call, tmp_path, random_weights):
    kinds = ",".join(tiny.KINDS)
    records = call("demo", "--budget", 30, "--output", tmp_path, "--kinds", kinds, "--json").record
    assert sorted(record["kind"] for record in records) == sorted(tiny.KINDS)
    for record in records:
        assert tiny.ask(tiny.draw_scene(record["scene"]), 0, [record["kind"]])
        assert sum(record["tokens_per_layer"]) == 30 * len(record["tokens_per_layer"])


def test_the_picture_has_a_row_per_question(call, tmp_path, random_weights):
    folder = tmp_path / "new" / "folder"
    outcome = call("demo", "--budget", 30, "--output", folder, "--kinds", "colour,count")
    assert str(folder / "kept_patches.png") in outcome.out
    with Image.open(folder / "kept_patches.png") as two:
        height = two.height
    call("demo", "--budget", 30, "--output", folder, "--kinds", "colour")
    with Image.open(folder / "kept_patches.png") as one:
        assert height == 2 * one.height


def test_the_table_shows_both_answers_and_the_savings(call, tmp_path, random_weights):
    out = call("demo", "--budget", "1/4", "--output", tmp_path, "--kinds", "exists,count").out
    for words in ("all 144", "pruned", "MI", "FLOPs", "KV", "75.0% pruned", "how many"):
        assert words in out


def test_the_embedded_model_answers_with_8_of_9_tokens_pruned(call, tmp_path):
    records = call("demo", "--output", tmp_path, "--json").record
    assert {record["kind"] for record in records} == {*tiny.EASY, *tiny.HARD}
    assert all(record["mean_tokens"] * 9 == record["num_visual"] for record in records)
    assert [r["question"] for r in records if not r["correct_unpruned"]] == []
    assert [r["question"] for r in records if not r["correct"]] == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--kinds", "weather"), "kinds must be some of"),
        (("--kinds", ","), "kinds must be some of"),
        (("--budget", "0"), "budget '0'"),
        (("--method", "magic"), "there is no method 'magic'"),
    ],
)
def test_what_it_cannot_do(call, tmp_path, words, message):
    outcome = call("demo", "--output", tmp_path / "demo", *words)
    assert outcome.code == 2
    assert outcome.err.count("\n") == 1
    assert message in outcome.err
    assert not (tmp_path / "demo").exists()


def test_an_output_that_is_a_file(call, tmp_path):
    path = tmp_path / "demo"
    path.write_text("mine")
    outcome = call("demo", "--output", path)
    assert outcome.code == 2
    assert "is a file" in outcome.err
    assert path.read_text() == "mine"
