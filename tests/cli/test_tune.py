"""`autoprune tune` writes settings that `run` and `compare` take, and refuses what cannot be right."""

from __future__ import annotations

import csv
import json
import re

import pytest

from autoprune import AutoPrune, Budget, load_method, tiny
from autoprune.commands import tune as command
from autoprune.commands.inputs import budget_text, parse_budget
from autoprune.methods.tuned_file import ModelIdentity, TunedFile, settings_of


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    """A file of 20 prompts without answers, about 20 pictures."""
    folder = tmp_path_factory.mktemp("prompts")
    lines = []
    for number in range(20):
        tiny.draw_scene(number).image.save(folder / f"{number}.png")
        lines.append(json.dumps({"image": f"{number}.png", "question": "what colour is the ring?"}))
    path = folder / "prompts.jsonl"
    path.write_text("\n".join(lines))
    return path


@pytest.fixture
def tune(call, prompts, model_folder, tmp_path):
    """`autoprune tune` on a small model with random weights: two trials, answers of two tokens."""

    def run(*words):
        fixed = ("--model", model_folder, "--prompts", prompts, "--output", tmp_path / "tuned")
        few = ("--trials", 2, "--methods", "autoprune,fastv", "--max-new-tokens", 2)
        return call("tune", *fixed, *few, "--budget", 40, "--workers", 1, "--no-timing", *words)

    return run


@pytest.fixture
def tuned_file(tmp_path, model_folder):
    """Writes a file that was tuned for the small model, or for the embedded one."""

    def write(method, embedded=False):
        from autoprune.loading import load_embedded, load_model

        loaded = load_embedded() if embedded else load_model(str(model_folder))
        identity = ModelIdentity.of(loaded.model, loaded.name)
        path = tmp_path / f"{method.name}.json"
        settings = settings_of(method)
        TunedFile(method.name, method.budget, settings, identity, {}, {}, "0.1.0").write(path)
        return path

    return write


def test_it_tunes_judges_and_writes_and_then_continues(tune, tmp_path):
    found = tune()
    assert found.code == 0, found.err
    assert "20 prompts are few: below 200 the search follows chance" in found.err
    assert "The best of 2 trials, on the prompts they were tuned on" in found.out
    assert "On 10 other prompts, about 10 pictures" in found.out
    assert re.search(r"Chosen: (default|tuned); ", found.out)
    method = load_method(tmp_path / "tuned" / "tuned.json")
    assert method.budget == Budget.tokens(40) and repr(method) in found.out
    with (tmp_path / "tuned" / "trials.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["number"] for row in rows] == ["0", "1"]
    assert json.loads(rows[1]["candidate"])["method"] == "fastv"
    again = tune("--json").record
    assert again["method"] == method.name
    assert [trial["agreement"] for trial in again["trials"]] == [
        float(row["agreement"]) for row in rows
    ]
    assert set(again["judged"]) == {"tuned", "default", *("fastv", "pdrop"), *again["judged"]}
    other = tune("--seed", 1)
    assert other.code == 2 and "holds another search: seed was 0 and is 1" in other.err


def test_the_file_is_taken_by_run_and_compare(ask, call, tuned_file, tmp_path, model_folder):
    path = tuned_file(AutoPrune(Budget.ratio(1 / 4), k0=0.7))
    record = call(
        *("run", *_picture(tmp_path), "--model", model_folder, "--method", path, "--json")
    ).record
    assert record["method"] == "autoprune" and record["mean_tokens"] == 36
    table = call(
        *("compare", "--methods", f"{path},fastv", "--model", model_folder, "--questions", 1),
        *(
            "--kinds",
            "colour",
            "--no-timing",
            "--workers",
            1,
            "--output",
            tmp_path / "run",
            "--json",
        ),
    ).record
    assert [(row["method"], row["budget"], row["status"]) for row in table] == [
        *(("full", "1", "ok"), (str(path), "1/4", "ok"), ("fastv", "1/4", "ok")),
    ]


def _picture(folder):
    path = folder / "scene.png"
    tiny.draw_scene(3).image.save(path)
    return path, "what colour is the ring?"


def test_a_file_is_refused_at_another_budget_and_on_another_model(
    call, tuned_file, tmp_path, model_folder
):
    path = tuned_file(AutoPrune(36), embedded=True)
    asked = ("run", *_picture(tmp_path), "--method", path)
    for words, said in (
        (("--budget", 16), "was tuned for 36 visual tokens per layer (mean entering), not for 16"),
        (("--k0", 0.3), "were tuned together, and 'k0' would change them"),
        (("--set", "beta=1"), "were tuned together, and 'beta=1' would change them"),
        (("--model", model_folder), "were tuned for 'embedded model', llava with 16 layers"),
    ):
        found = call(*asked, *words)
        assert found.code == 2 and said in found.err and found.err.count("\n") == 1
    found = call("run", *_picture(tmp_path), "--method", tmp_path / "missing.json")
    assert found.code == 2 and "cannot read the tuned settings" in found.err
    found = call("compare", "--methods", tmp_path / "missing.json", "--output", tmp_path / "run")
    assert found.code == 2 and "cannot read the tuned settings" in found.err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--budget", "many"), "budget 'many'"),
        (("--pictures", "here"), "give --prompts, or --pictures with --questions, not both"),
        (("--prompts", "none.jsonl"), "there is no task file 'none.jsonl'"),
        (("--count", 19), "got 19 about 19"),
        (("--methods", "vtw"), "methods to tune are some of autoprune"),
        (("--budget", "0.01"), "no settings can run on this model at this budget"),
    ],
)
def test_bad_input_is_one_sentence(tune, words, said):
    found = tune(*words)
    last = found.err.strip().splitlines()[-1]
    assert found.code == 2 and last.startswith("autoprune: ") and said in last


def test_prompts_come_from_one_place(call, model_folder, tmp_path):
    output = ("--output", tmp_path / "tuned")
    found = call("tune", "--model", model_folder, *output)
    assert found.code == 2 and "the built-in questions are those of the embedded model" in found.err
    found = call("tune", "--model", model_folder, "--pictures", tmp_path, *output)
    assert found.code == 2 and "--pictures and --questions go together" in found.err


def test_ctrl_c_says_how_to_go_on(tune, monkeypatch, tmp_path):
    def stop(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "tune", stop)
    found = tune()
    assert found.code == 130
    assert f"stopped; the same command continues in {str(tmp_path / 'tuned')!r}" in found.err


def test_optuna_is_asked_for_in_a_sentence(tune, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "optuna", None)
    found = tune()
    assert found.code == 2 and "pip install 'autoprune[tune]'" in found.err


@pytest.mark.parametrize(
    "text", ["16", "1/9", "36.5", "1/4", "16.123456789", "11%", "33.3333%", "100%"]
)
def test_a_budget_is_written_as_it_is_read(text):
    assert parse_budget(budget_text(parse_budget(text))) == parse_budget(text)


def test_a_budget_without_words():
    assert budget_text(Budget.ratio(1 / 9)) == "1/9" and budget_text(Budget.tokens(16)) == "16"
    with pytest.raises(ValueError, match="cannot be given on the command line"):
        budget_text(Budget.flops(0.5))
