"""`autoprune compare` turns words into settings, shows the table, and says how to go on."""

from __future__ import annotations

import json
import re

import pytest

from autoprune import list_methods, tiny
from autoprune.commands import compare as command
from autoprune.commands.compare import parse_budgets
from autoprune.commands.inputs import build_method, parse_budget, parse_methods


@pytest.fixture
def compare(call, tmp_path, model_folder):
    """`autoprune compare` on a small model with random weights and one question of two kinds."""

    def run(*words):
        defaults = {"--model": model_folder, "--output": tmp_path / "run", "--questions": 1}
        defaults |= {"--kinds": "colour,exists", "--workers": 1}
        if "--tasks" in words:
            del defaults["--kinds"]
        fixed = [word for pair in defaults.items() if pair[0] not in words for word in pair]
        return call("compare", *fixed, *words)

    return run


@pytest.mark.parametrize(
    ("text", "chosen"),
    [
        ("random", [("random", "random", ())]),
        ("autoprune, random", [("autoprune", "autoprune", ()), ("random", "random", ())]),
        (
            "autoprune:k0=0.2,beta=1,random:seed=3",
            [
                ("autoprune:k0=0.2,beta=1", "autoprune", ("k0=0.2", "beta=1")),
                ("random:seed=3", "random", ("seed=3",)),
            ],
        ),
        (
            "steep@autoprune:k0=0.8,gamma=0,again@random",
            [("steep", "autoprune", ("k0=0.8", "gamma=0")), ("again", "random", ())],
        ),
        ("random,random", [("random", "random", ())]),
        ("all", [(name, name, ()) for name in list_methods()]),
    ],
)
def test_methods_with_options_and_labels(text, chosen):
    assert parse_methods("--methods", text) == chosen


@pytest.mark.parametrize("text", ["", " , "])
def test_no_methods_or_budgets(text):
    with pytest.raises(ValueError, match="--methods is empty"):
        parse_methods("--methods", text)
    with pytest.raises(ValueError, match="--budgets is empty"):
        parse_budgets(text)


def test_budgets_are_kept_as_typed_and_checked():
    assert parse_budgets("1/4, 64,11%,64") == ["1/4", "64", "11%"]
    with pytest.raises(ValueError, match="budget 'many'"):
        parse_budgets("64,many")


def test_released_stands_for_the_methods_as_their_authors_wrote_them():
    chosen = parse_methods("--methods", "random,released")
    labels = [label for label, _, _ in chosen]
    assert labels[0] == "random" and labels[1:] == [
        f"{name} as released"
        for name in (
            *("pdrop", "sparsevlm", "fastervlm", "vispruner", "visionzip", "prumerge", "hiprune"),
            *("divprune", "cdpruner", "scope", "tome", "turbo", "folder"),
        )
    ]
    for label, name, options in chosen[1:]:
        method = build_method(name, parse_budget("1/4"), {}, options)
        assert method.positions == "compacted", label
    options = dict(option.split("=") for option in chosen[labels.index("visionzip as released")][2])
    assert options == {"positions": "compacted", "mask_padding": "False", "order": "released"}
    with pytest.raises(ValueError, match="option 'k0=1' follows no method"):
        parse_methods("--methods", "released,k0=1")


def test_the_table_has_every_setting_and_what_it_spent(compare, tmp_path):
    out = compare("--methods", "random,autoprune:k0=0.2", "--budgets", "1/4,1/3", "--no-timing").out
    for words in ("full", "random", "autoprune:k0=0.2", "1/3", "144", "36", "48", "Report"):
        assert words in out
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert names == {
        "config.json", "predictions", "results.csv", "results.json", "report.md", "report.html",
        "accuracy_vs_flops.png",
    }  # fmt: skip


def test_json_is_one_row_per_setting(compare):
    rows = compare("--methods", "random,autoprune", "--budgets", "1/4", "--json").record
    assert [row["method"] for row in rows] == ["full", "random", "autoprune"]
    assert rows[2]["tokens_entering"] == 36
    assert rows[2]["prefill_ms"] > 0


def test_an_infeasible_setting_is_a_line_and_the_rest_goes_on(compare):
    words = ("--methods", "autoprune,autoprune_reference,random", "--no-timing")
    out = " ".join(compare(*words, "--budgets", "1/48").out.split())
    assert "infeasible: autoprune at 1/48: the smallest feasible budget here is" in out
    assert "2.08333 % of the visual tokens cannot pay for" in out
    smallest = re.search(r"smallest feasible budget here is ([\d.]+%);", out)[1]
    assert parse_budgets(smallest) == [smallest]
    assert "or give the method :first_cut=pre_llm" in out
    assert "infeasible: autoprune_reference at 1/48: the released code knows only" in out
    assert "│ random" in out


def test_quick_asks_all_methods_at_two_budgets(compare):
    rows = compare("--quick", "--no-timing", "--json").record
    assert [(row["method"], row["budget"]) for row in rows[1:]] == [
        (name, budget) for name in list_methods() for budget in ("1/4", "1/9")
    ]


def test_tasks_of_ones_own(compare, tmp_path):
    tiny.draw_scene(3).image.save(tmp_path / "scene.png")
    task = {"image": "scene.png", "question": "what is it?", "answer": ["ring"], "kind": "mine"}
    path = tmp_path / "tasks.jsonl"
    path.write_text(json.dumps(task))
    rows = compare("--tasks", path, "--methods", "random", "--budgets", "20", "--json").record
    assert rows[1]["questions"] == 1
    assert rows[1]["accuracy_mine"] in (0, 1)
    path.write_text(json.dumps(task) + "\n" + json.dumps({**task, "answer": None}))
    outcome = compare("--tasks", path, "--methods", "random", "--budgets", "20")
    assert outcome.code == 2
    assert "tasks.jsonl, line 2, answer: expected a text, a number or a list of them" in outcome.err


def test_ctrl_c_says_how_to_go_on(compare, tmp_path, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "run_comparison", stop)
    outcome = compare("--methods", "random")
    assert outcome.code == 130
    assert outcome.err.count("\n") == 1
    assert f"the same command continues in {str(tmp_path / 'run')!r}" in outcome.err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--methods", "magic"), "there is no method 'magic'"),
        (("--methods", "autoprune:depth=3"), "has no option 'depth'"),
        (("--methods", "autoprune:k0=-1"), "k0 must be 0 or more"),
        (("--methods", "k0=0.3,random"), "option 'k0=0.3' follows no method"),
        (("--methods", "random,seed=3"), "write method:seed=3"),
        (("--methods", "random", "--budgets", "0"), "budget '0'"),
        (("--methods", "random", "--kinds", "weather"), "kinds must be some of"),
        (("--methods", "random", "--baseline", "fastv"), "the baseline 'fastv' is not compared"),
        (("--methods", "random", "--tasks", "none.jsonl"), "there is no task file"),
        (("--model", "/no/where"), "there is no model folder"),
    ],
)
def test_what_it_cannot_do(compare, tmp_path, words, message):
    outcome = compare(*words)
    assert outcome.code == 2
    assert message in outcome.err
    assert outcome.err.strip().count("\n") == 0
    assert not (tmp_path / "run").exists()


def test_another_comparison_in_the_folder_is_refused(compare):
    words = ("--methods", "random", "--no-timing", "--budgets")
    assert compare(*words, "1/4").code == 0
    outcome = compare(*words, "1/3")
    assert outcome.code == 2
    changes = "setting random at 1/4 is left out; setting random at 1/3 is new"
    assert f"holds another comparison: {changes}" in outcome.err


def test_an_empty_list_of_budgets_is_none_and_the_singular_will_do(compare):
    outcome = compare("--method", "random", "--budget", "")
    assert outcome.code == 2 and "--budgets is empty" in outcome.err
