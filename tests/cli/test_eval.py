"""`autoprune eval` on what needs no harness, and what it refuses before anything starts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest


def test_the_suites_are_listed(call):
    out = call("eval", "--list")
    assert out.code == 0
    for word in ("shapes", "paper-llava-1.5", "192, 128, 64", "640, 320, 160", "mmmu_val"):
        assert word in out.out


def test_shapes_are_the_default_and_need_nothing(call, tmp_path: Path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    folder = tmp_path / "run"
    words = ("--methods", "random", "--budgets", "1/4", "--limit", 1, "--no-timing", "--json")
    out = call("eval", *words, "--output", folder)
    assert out.code == 0
    full, pruned = out.record
    assert (full["method"], full["budget"]) == ("full", "1")
    assert pruned["tokens_entering"] == 36
    assert full["questions"] == pruned["questions"] == 9
    assert (folder / "report.md").is_file()
    again = call("eval", *words, "--output", folder)
    assert again.record == out.record


def test_a_file_of_questions_goes_the_way_of_compare(call, picture: Path, tmp_path: Path):
    lines = [
        {"image": str(picture), "question": "is there a red ring?", "answer": "yes"},
        {"image": str(picture), "question": "is there a ring?", "answer": "no"},
    ]
    questions = tmp_path / "own.jsonl"
    questions.write_text("".join(json.dumps(line) + "\n" for line in lines))
    words = ("--methods", "uniform", "--budgets", "36", "--no-timing", "--json", "--limit", 1)
    out = call("eval", "--tasks", questions, *words, "--output", tmp_path / "run")
    assert [row["questions"] for row in out.record] == [1, 1]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--suite", "paper"), "there is no suite 'paper'; choose one of shapes, paper-llava-1.5"),
        (("--suite", "mmmu", "--tasks", "gqa"), "give --suite or --tasks, not both"),
        (("--tasks", " , "), "--tasks is empty"),
        (("--tasks", "gqa,vqav2_test"), "take vqav2_val instead"),
        (("--tasks", "gqa,mmvet"), "needs OPENAI_API_KEY"),
        (("--tasks", "gqa", "--budgets", "many"), "budget 'many'"),
        (("--tasks", "gqa"), "need the harness lmms-eval: pip install 'autoprune[eval]'"),
        (("--suite", "mmmu"), "need the harness lmms-eval: pip install 'autoprune[eval]'"),
    ],
)
def test_what_cannot_run_is_said_before_anything_starts(
    words, said: str, call, tmp_path: Path, monkeypatch
):
    for key in ("OPENAI_API_KEY", "AZURE_API_KEY"):
        monkeypatch.delenv(key, raising=False)
    found = __import__("importlib.util").util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name: None if name == "lmms_eval" else found(name)
    )
    folder = tmp_path / "run"
    out = call("eval", *words, "--output", folder)
    assert out.code == 2
    assert said in out.err
    assert len(out.err.strip().splitlines()) == 1
    assert not folder.exists()


def test_methods_and_options_are_checked_before_a_harness_starts(call, tmp_path: Path, monkeypatch):
    monkeypatch.setattr("autoprune.commands.eval.check_harness", lambda: None)
    out = call("eval", "--tasks", "gqa", "--methods", "fast", "--output", tmp_path / "run")
    assert "there is no method 'fast'" in out.err
    out = call("eval", "--tasks", "gqa", "--methods", "fastv:k0=1", "--output", tmp_path / "run")
    assert "fastv has no option 'k0'" in out.err
    out = call("eval", "--tasks", "gqa", "--baseline", "vtw", "--output", tmp_path / "run")
    assert "the baseline 'vtw' is not compared; choose one of autoprune" in out.err
    assert not (tmp_path / "run").exists()


def test_a_method_with_other_settings_or_code_is_another_run(call, tmp_path: Path, monkeypatch):
    seen: list[dict[str, str]] = []

    def remember(jobs, refused, folder, wanted):
        seen.append({job.setting.label: job.fingerprint for job in jobs})
        raise KeyboardInterrupt

    monkeypatch.setattr("autoprune.commands.eval.check_harness", lambda: None)
    monkeypatch.setattr("autoprune.evaluation.harness.evaluation.evaluate", remember)
    for layer in (2, 3):
        methods = f"own@fastv:layer={layer}"
        call(
            "eval", "--tasks", "gqa", "--methods", methods, "--budgets", "64", "--output", tmp_path
        )
    first, second = seen
    assert first["full"] == second["full"] != ""
    assert first["own"] != second["own"]


def test_an_export_without_its_package_names_the_extra(call, tmp_path: Path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    out = call("eval", "--export", tmp_path / "shapes")
    assert out.code == 2
    assert "the export needs datasets: pip install 'autoprune[eval]'" in out.err
