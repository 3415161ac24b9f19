"""The parts of an evaluation that need no harness: its suites, what tasks need, generation, outputs, runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from autoprune.evaluation.harness.costs import cost_of_rounds
from autoprune.evaluation.harness.generation import MAX_NEW_TOKENS, generation_of
from autoprune.evaluation.harness.needs import check_needs
from autoprune.evaluation.harness.outputs import Unfinished, correctness, read_output
from autoprune.evaluation.harness.runs import COSTS, Failed, Harness, Job, finished, run
from autoprune.evaluation.harness.scores import columns, scores, to_text
from autoprune.evaluation.harness.suites import SUITES, published, suite_of
from autoprune.evaluation.settings import REFERENCE, Setting

from .harness_files import TASK, Pretended, write_results

# Costs.


def test_a_dialogue_costs_what_its_rounds_cost_together():
    first = {"text": 5, "visual": 100, "entering": 10, "flops": 3, "flops_full": 9, "kv_bytes": 2}
    first |= {"kv_bytes_full": 8, "mutual_information": 0.5, "seconds": 1.0, "new_tokens": 4}
    second = first | {"text": 7, "entering": 30, "flops": 5, "new_tokens": 1, "seconds": 0.5}
    assert cost_of_rounds([first, second]) == {
        **{"text": 7, "visual": 100, "entering": 20, "flops": 8, "flops_full": 18, "kv_bytes": 4},
        **{"kv_bytes_full": 16, "mutual_information": 0.5, "seconds": 1.5, "new_tokens": 5},
    }


# Suites.


def test_published_figures_stand_at_their_method_and_budget():
    def mean(method: str, budget: str) -> list[float]:
        return [figure.value for figure in published("paper-llava-1.5", method, budget)]

    assert [mean("autoprune", budget) for budget in ("192", "128", "64")] == [
        [99.0],
        [98.1],
        [96.7],
    ]
    assert [mean("sparsevlm", budget) for budget in ("192", "128", "64")] == [
        [95.5],
        [93.0],
        [85.9],
    ]
    assert mean("autoprune_reference", "64") == [96.7]
    assert mean("random", "64") == []
    assert [f.value for f in published("mmmu", "full", "1")] == [34.9]
    qwen = {f.task: f.value for f in published("paper-qwen2-vl", "autoprune", "400")}
    assert qwen == {"mmbench_en_dev_static": 79.4, "pope": 86.1, "textvqa_val": 78.6}


def test_every_published_figure_is_of_a_suite_that_runs_it():
    for suite in SUITES.values():
        for budget in suite.budgets:
            for figure in published(suite.name, "autoprune", budget):
                assert figure.task is None or figure.task in suite.tasks
    assert suite_of("paper-llava-next").budgets == ("640", "320", "160")
    with pytest.raises(ValueError, match="no suite 'paper'; choose one of shapes, paper-llava-1"):
        suite_of("paper")


# What tasks need.


@pytest.mark.parametrize(
    ("task", "said"),
    [
        ("vqav2_test", "have to be uploaded to a server; take vqav2_val instead"),
        ("mmbench_en_test", "uploaded to a server; take mmbench_en_dev_static instead"),
        ("egoschema", "take egoschema_subset instead"),
        ("mmbench_en_dev", "needs OPENAI_API_KEY; take mmbench_en_dev_static instead"),
        ("mmvet", "needs OPENAI_API_KEY; leave it out"),
        ("coco2017_cap_val", "there is no java here; install it"),
    ],
)
def test_what_a_task_needs_is_said_before(task: str, said: str, monkeypatch: Any):
    monkeypatch.setattr("shutil.which", lambda name: None)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.delenv("AZURE_API_KEY", raising=False)
    with pytest.raises(ValueError, match=said):
        check_needs(["gqa", task])


def test_what_is_there_is_not_asked_for(monkeypatch: Any):
    monkeypatch.setattr("shutil.which", lambda name: f"/bin/{name}")
    monkeypatch.setenv("OPENAI_API_KEY", "a key")
    check_needs(["mmvet", "mmbench_en_dev", "coco2017_cap_val", "egoschema_subset"])
    for suite in SUITES.values():
        check_needs(suite.tasks)


# Generation.


@pytest.mark.parametrize(
    ("asked", "options"),
    [
        ({}, {"max_new_tokens": MAX_NEW_TOKENS, "num_beams": 1, "do_sample": False}),
        (
            {"max_new_tokens": 16, "temperature": 0, "top_p": 1.0, "do_sample": True},
            {"max_new_tokens": 16, "num_beams": 1, "do_sample": False},
        ),
        (
            {"max_gen_toks": 8.0, "temperature": 0.7, "top_p": 0.9, "num_beams": None},
            {
                "max_new_tokens": 8,
                "num_beams": 1,
                "do_sample": True,
                "temperature": 0.7,
                "top_p": 0.9,
            },
        ),
        (
            {"temperature": 0.7, "do_sample": False, "repetition_penalty": 1.2},
            {
                "max_new_tokens": MAX_NEW_TOKENS,
                "num_beams": 1,
                "do_sample": False,
                "repetition_penalty": 1.2,
            },
        ),
    ],
)
def test_generation_is_greedy_unless_a_temperature_is_given(asked: Any, options: Any):
    assert dict(generation_of(asked).options) == options


def test_what_generate_does_not_know_is_left_out_with_a_warning():
    with pytest.warns(UserWarning, match="asks for 'image_aspect_ratio'"):
        assert "image_aspect_ratio" not in generation_of({"image_aspect_ratio": "pad"}).options


def test_an_answer_ends_at_the_first_of_its_ends():
    generation = generation_of({"until": ["USER:", "\n\n"]})
    assert generation.shorten("a ring\n\nUSER: and now?") == "a ring"
    assert generation.shorten(" a ring USER: x\n\n") == "a ring"
    assert generation.shorten("a ring") == "a ring"
    with pytest.raises(ValueError, match="until must be a text"):
        generation_of({"until": 3})
    with pytest.raises(
        ValueError, match=r"max_new_tokens must be a whole number above 0, got 1\.5"
    ):
        generation_of({"max_new_tokens": 1.5})


# Outputs.


@pytest.mark.parametrize(
    ("said", "right"),
    [
        ({"exact_match": 0.3, "submission": {"answer": "x"}}, 0.3),
        ({"pope_accuracy": {"score": 1.0}}, 1.0),
        ({"mme_perception_score": {"question_id": 7, "score": 0.0}}, 0.0),
        ({"mlvu_percetion_score": {"pred_answer": "B", "answer": "B"}}, 1.0),
        ({"score": {"pred": 2, "ground_truth": "2"}}, 1.0),
        ({"lvb_acc": {"parsed_pred": "A", "answer": "C"}}, 0.0),
        ({"coco_CIDEr": {"pred": "a ring", "answer": ["a ring"], "image_id": 1}}, None),
        ({"gpt_eval_score": {"prediction": "A", "answer": "A", "index": 3}}, None),
        ({"doc_id": 1, "resps": [["x"]]}, None),
    ],
)
def test_how_right_an_answer_is_by_what_its_task_says(said: dict[str, Any], right: float | None):
    assert correctness({"doc_id": 0, "target": "t", "doc_hash": "h", **said}) == right


def test_an_output_holds_the_score_and_every_answer(tmp_path: Path):
    write_results(tmp_path, [1, 0, 1, 1])
    output = read_output(tmp_path, tmp_path / COSTS, TASK)
    assert output.score == 0.375
    assert output.figures == {"pope_accuracy": 0.75, "pope_f1_score": 0.375}
    assert [record["correct"] for record in output.answers] == [1, 0, 1, 1]
    assert output.answers[2]["id"] == "pope-2"
    assert output.answers[2]["kind"] == TASK
    assert output.answers[2]["entering"] == 16


def test_a_group_scores_the_mean_of_its_tasks(tmp_path: Path):
    write_results(tmp_path, [1, 1], task="part_a")
    first = json.loads((tmp_path / "model" / "20260101_000000_results.json").read_text())
    costs = (tmp_path / COSTS).read_text()
    write_results(tmp_path, [0, 1], task="part_b")
    second = json.loads((tmp_path / "model" / "20260101_000000_results.json").read_text())
    whole = {
        "results": {"both": {" ": " "}, **first["results"], **second["results"]},
        "n-samples": {**first["n-samples"], **second["n-samples"]},
        "group_subtasks": {"both": ["part_a", "part_b"], "part_a": [], "part_b": []},
    }
    (tmp_path / "model" / "20260101_000000_results.json").write_text(json.dumps(whole))
    (tmp_path / COSTS).write_text(costs + (tmp_path / COSTS).read_text())
    output = read_output(tmp_path, tmp_path / COSTS, "both")
    assert output.score == (1.0 + 0.5) / 2
    assert output.figures["part_b pope_accuracy"] == 0.5
    assert {record["kind"] for record in output.answers} == {"both"}
    assert len(output.answers) == 4


def no_results(folder: Path) -> None:
    next(folder.rglob("*_results.json")).unlink()


def no_task(folder: Path) -> None:
    write_results(folder, [1, 1], results={"gqa": {"exact_match,none": 1.0}})


def no_figure(folder: Path) -> None:
    write_results(folder, [1, 1], results={TASK: {"alias": TASK, "pope_stderr,none": 0.1}})


def no_samples(folder: Path) -> None:
    next(folder.rglob("*_samples_*")).unlink()


def too_few(folder: Path) -> None:
    write_results(folder, [1, 1], **{"n-samples": {TASK: {"effective": 3}}})


def no_cost(folder: Path) -> None:
    path = folder / COSTS
    path.write_text(path.read_text().splitlines(keepends=True)[0])


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (no_results, "wrote no results"),
        (no_task, "no figure of pope"),
        (no_figure, "no figure of pope"),
        (no_samples, "no answers of pope"),
        (too_few, "pope has 2 answers, expected 3"),
        (no_cost, "question 1 of pope has no record"),
    ],
)
def test_what_lacks_something_is_not_finished(spoil: Any, said: str, tmp_path: Path):
    write_results(tmp_path, [1, 1])
    spoil(tmp_path)
    with pytest.raises(Unfinished, match=said):
        read_output(tmp_path, tmp_path / COSTS, TASK)


# Runs.


HARNESS = Pretended({}, 1, None, 0, None)


def job(does: str, fingerprint: str = "") -> Job:
    return Job(REFERENCE, {"does": does}, fingerprint)


def calls(place: Path) -> int:
    return len((place.parent / "called").read_text())


def test_a_finished_run_is_kept_and_another_is_run_again(tmp_path: Path):
    place = tmp_path / "full__1" / TASK
    works = "write_results(folder, [1, 0])"
    assert finished(place, TASK, "a") is None
    output = run(HARNESS, job(works, "a"), TASK, place, lambda answers: None)
    assert not isinstance(output, str)
    assert output.score == 0.25
    kept = finished(place, TASK, "a")
    assert not isinstance(kept, str)
    assert kept is not None
    assert kept.answers == output.answers
    assert finished(place, TASK, "b") is None
    assert calls(place) == 1


@pytest.mark.parametrize(
    ("does", "said"),
    [
        ("print('the data set is away')", "wrote no results"),
        ("print('the data set is away'); sys.exit(3)", "exit code 3"),
        (
            "print('the data set is away'); write_results(folder, [1], results={})",
            "no figure of pope",
        ),
    ],
)
def test_a_run_that_lacks_something_is_named_with_the_end_of_its_log(
    does: str, said: str, tmp_path: Path
):
    place = tmp_path / "full__1" / TASK
    with pytest.raises(Failed, match=f"pope, full at 1: .*{said}") as failed:
        run(HARNESS, job(does), TASK, place, lambda answers: None)
    assert failed.value.last_lines() == ["the data set is away"]
    assert finished(place, TASK, "") is None
    # It is run again, and what it left before is no obstacle.
    run(HARNESS, job("write_results(folder, [1])"), TASK, place, lambda answers: None)
    assert finished(place, TASK, "") is not None
    assert sorted(path.name for path in place.parent.iterdir()) == ["called", TASK]


def test_the_errors_of_a_log_are_shown_with_its_end(tmp_path: Path):
    log = tmp_path / "log.txt"
    middle = "".join(f"  in line {n}\n" for n in range(20))
    log.write_text(
        f"FileNotFoundError: no gone.parquet\n{middle}FileNotFoundError: no gone.parquet\n"
        f"{middle}\n\x1b[31mtenacity.RetryError: raised\x1b[0m\nend\n"
    )
    lines = Failed(TASK, REFERENCE, "", log).last_lines()
    assert lines[0] == "FileNotFoundError: no gone.parquet"
    assert lines[1:] == [
        "  in line 17",
        "  in line 18",
        "  in line 19",
        "tenacity.RetryError: raised",
        "end",
    ]
    assert Failed(TASK, REFERENCE, "", tmp_path / "none").last_lines() == []


def test_what_a_killed_run_left_counts_for_nothing(tmp_path: Path):
    place = tmp_path / "full__1" / TASK
    left = place.with_name(f"{TASK}.0123abcd")
    write_results(left, [1, 1, 1])
    assert finished(place, TASK, "") is None
    output = run(HARNESS, job("write_results(folder, [0])"), TASK, place, lambda answers: None)
    assert not isinstance(output, str)
    assert len(output.answers) == 1
    assert not left.exists()


def test_why_a_setting_was_refused_is_kept(tmp_path: Path):
    place = tmp_path / "vtw__1" / TASK
    does = "(folder / 'costs.jsonl.refused').write_text('the budget is too small')"
    said = run(HARNESS, job(does), TASK, place, lambda answers: None)
    assert said == finished(place, TASK, "") == "the budget is too small"


def test_what_the_harness_would_take_for_two_values_is_refused(tmp_path: Path):
    harness = Harness({"pretrained": "/models/a,b"}, 1, None, 0, None)
    with pytest.raises(ValueError, match="pretrained with a comma in it: '/models/a,b'"):
        harness.command(job(""), TASK, tmp_path)


def test_the_harness_is_called_with_everything_it_has_to_know(tmp_path: Path):
    harness = Harness({"pretrained": "X"}, 4, 10, 3, Path("mine"))
    own = Job(REFERENCE, {"method": "pdrop", "budget": "1/9", "layers": "2 6 15"})
    words = harness.command(own, TASK, tmp_path)
    given = dict(zip(words[3:-1:2], words[4:-1:2], strict=True))
    assert given == {
        "--model": "autoprune",
        "--model_args": f"pretrained=X,method=pdrop,budget=1/9,layers=2 6 15,costs={tmp_path / COSTS}",
        "--tasks": TASK,
        "--batch_size": "4",
        "--output_path": str(tmp_path),
        "--seed": "3",
        "--limit": "10",
        "--include_path": "mine",
    }
    assert words[-1] == "--log_samples"


# Scores.


def test_scores_stand_beside_the_unpruned_models_and_the_published_ones(tmp_path: Path):
    write_results(tmp_path / "full", [1, 1, 1, 1], entering=576)
    write_results(tmp_path / "own", [1, 0, 1, 1], said="Yes.")
    full, own = (
        {TASK: read_output(tmp_path / name, tmp_path / name / COSTS, TASK)}
        for name in ("full", "own")
    )
    own[TASK].answers[1]["prediction"] = "no"
    pruned = Setting("autoprune", "600", None)
    table = scores([REFERENCE, pruned], {REFERENCE: full, pruned: own}, "paper-qwen2-vl")
    first, second = table
    assert first["relative"] == first["agreement"] == 1
    assert second["relative"] == 0.75
    # "Yes." is "yes".
    assert second["agreement"] == 0.75
    assert second["tokens_entering"] == 16
    assert second["flops_share"] == 0.25
    assert second["kv_bytes_share"] == 0.25
    assert second["tasks"][TASK]["published"] == 86.5
    shown = columns(table, [TASK])
    assert shown[TASK] == ["0.5 (100.0%), published 86.4", "0.375 (75.0%), published 86.5"]
    assert shown["tokens"] == ["576", "16"]
    assert "published" not in shown
    mean = scores([REFERENCE], {REFERENCE: full}, "")[0] | {"published": 96.7}
    assert columns([mean], [TASK])["published"] == ["96.7%"]
    text = to_text(table, [TASK], "paper-qwen2-vl")
    assert "| autoprune | 600 | 16 |" in text
    assert "AutoPrune (NeurIPS 2025), rebuttal: Qwen2-VL" in text
