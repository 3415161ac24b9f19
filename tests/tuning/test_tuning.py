"""A whole search on the embedded model: it is what its parts are, and nothing is asked twice."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from autoprune import AutoPrune, Budget, load_method, tiny
from autoprune.tuning import Options, built_in_prompts, examination, folder_prompts, tune

BUDGET = Budget.tokens(24)
OPTIONS = Options(trials=3, methods=("autoprune", "fastv"), new_tokens=8, timing=False)


@pytest.fixture(scope="module")
def loaded():
    return tiny.load()


@pytest.fixture(scope="module")
def prompts():
    return built_in_prompts(30)


@pytest.fixture(scope="module")
def finished(loaded, prompts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tuning") / "run"
    return folder, tune(*loaded, prompts, BUDGET, folder, OPTIONS)


def test_every_trial_has_its_agreement_and_its_price(finished):
    _, result = finished
    assert [trial.number for trial in result.trials] == [0, 1, 2]
    assert {trial.candidate["method"] for trial in result.trials} == {"autoprune", "fastv"}
    for trial in result.trials:
        assert trial.state == "complete" and trial.prompts == 15
        assert 0 <= trial.agreement <= 1 and trial.divergence >= 0
        assert trial.entering <= 24 and 0 < trial.flops_share < 0.3 and trial.milliseconds > 0
    assert result.trials[0].entering == 24


def test_the_default_and_the_baselines_are_judged_on_other_prompts(finished, loaded, prompts):
    _, result = finished
    rows = {own.label: own for own in result.judged}
    others = ["fastv", "pdrop", "divprune", "scope", "cdpruner", "uniform"]
    assert list(rows) == ["tuned", "default", *others]
    assert all(own.agreement is not None for own in result.judged)
    assert result.file.prompts == {
        **{"tuned_on": 15, "judged_on": 15, "pictures_judged_on": 15},
        **{"trials": 3, "seed": 0},
    }
    # Fifteen prompts cannot show a gain, or show one: the file holds what was chosen.
    assert result.file.method == result.chosen.method.name


def test_the_default_agrees_as_often_as_its_answers_are_the_plain_ones(finished, loaded, prompts):
    from autoprune.tuning.split import split

    model, processor = loaded
    held_out = split(prompts, 0).held_out
    same = 0
    for task in held_out:
        plain = tiny.answer(model, processor, task.image, task.question, 8)
        with AutoPrune(BUDGET)(model):
            same += tiny.answer(model, processor, task.image, task.question, 8) == plain
    default = next(own for own in finished[1].judged if own.label == "default")
    assert default.agreement.value == pytest.approx(same / 15)


def test_the_file_builds_what_was_chosen(finished, loaded, tmp_path):
    _, result = finished
    path = tmp_path / "tuned.json"
    result.file.write(path)
    method = load_method(path)
    assert method == result.chosen.method and method.budget == BUDGET
    assert json.loads(path.read_text())["judged"]["verdict"] == result.verdict
    method(loaded[0])


def test_the_same_call_asks_nothing_again(finished, loaded, prompts, monkeypatch):
    folder, result = finished

    def fail(*arguments):
        raise AssertionError("asked again")

    monkeypatch.setattr(examination, "scores", fail)
    monkeypatch.setattr(examination, "plain_answers", fail)
    again = tune(*loaded, prompts, BUDGET, folder, OPTIONS)
    assert (again.trials, again.judged, again.verdict) == (
        result.trials,
        result.judged,
        result.verdict,
    )


def test_what_was_interrupted_ends_as_if_it_had_not_been(
    finished, loaded, prompts, tmp_path, monkeypatch
):
    _, result = finished
    whole, calls = examination.scores, []

    def stop(*arguments):
        calls.append(1)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return whole(*arguments)

    monkeypatch.setattr(examination, "scores", stop)
    with pytest.raises(KeyboardInterrupt):
        tune(*loaded, prompts, BUDGET, tmp_path / "run", OPTIONS)
    again = tune(*loaded, prompts, BUDGET, tmp_path / "run", OPTIONS)

    def without_time(trials):
        return [dataclasses.replace(trial, milliseconds=None) for trial in trials]

    assert without_time(again.trials) == without_time(result.trials)
    assert again.judged == result.judged and again.file == result.file


def test_two_workers_find_what_one_finds(finished, loaded, prompts, tmp_path):
    _, result = finished
    options = dataclasses.replace(OPTIONS, workers=2, trials=1)
    found = tune(*loaded, prompts, BUDGET, tmp_path / "run", options)
    assert found.trials[0].agreement == result.trials[0].agreement
    assert found.trials[0].divergence == pytest.approx(result.trials[0].divergence, abs=1e-6)


def test_a_folder_of_another_search_is_refused(finished, loaded, prompts):
    folder, _ = finished
    for change, said in (
        ({"seed": 1}, "seed was 0 and is 1"),
        ({"methods": ("autoprune",)}, "searched fastv is left out"),
        ({"new_tokens": 9}, "new_tokens was 8 and is 9"),
    ):
        with pytest.raises(ValueError, match=f"holds another search: .*{said}"):
            tune(*loaded, prompts, BUDGET, folder, dataclasses.replace(OPTIONS, **change))
    with pytest.raises(ValueError, match=r"holds another search: budget was"):
        tune(*loaded, prompts, Budget.tokens(25), folder, OPTIONS)


def test_options_out_of_range(loaded, prompts, tmp_path):
    for change, said in (
        ({"trials": 0}, "trials must be at least 1, got 0"),
        ({"new_tokens": 0}, "new_tokens must be at least 1"),
        ({"workers": 0}, "workers must be at least 1"),
    ):
        with pytest.raises(ValueError, match=said):
            tune(*loaded, prompts, BUDGET, tmp_path / "r", dataclasses.replace(OPTIONS, **change))
    with pytest.raises(ValueError, match="got 19 about 19"):
        tune(*loaded, prompts[:19], BUDGET, tmp_path / "r", OPTIONS)
    assert not (tmp_path / "r").exists()


def test_built_in_prompts_bring_no_labels(prompts):
    assert {(task.kind, task.answers) for task in prompts} == {("all", ())}
    assert len({task.id for task in prompts}) == 30


def test_pictures_of_a_folder_take_turns_with_the_questions(tmp_path):
    for name in "abc":
        tiny.draw_scene(ord(name)).image.save(tmp_path / f"{name}.png")
    (tmp_path / "notes.md").write_text("no picture")
    questions = tmp_path / "questions.txt"
    questions.write_text("one?\n\ntwo?\none?\n")
    found = folder_prompts(tmp_path, questions, 5)
    assert [(task.image.name, task.question) for task in found] == [
        *(("a.png", "one?"), ("b.png", "two?"), ("c.png", "one?")),
        *(("a.png", "two?"), ("b.png", "one?")),
    ]
    assert len({task.id for task in found}) == 5
    assert len(folder_prompts(tmp_path, questions, 100)) == 6
    questions.write_text("\n")
    with pytest.raises(ValueError, match="no questions in"):
        folder_prompts(tmp_path, questions, 5)
    with pytest.raises(ValueError, match="cannot read the questions"):
        folder_prompts(tmp_path, tmp_path / "missing.txt", 5)
    with pytest.raises(ValueError, match="no folder of pictures"):
        folder_prompts(tmp_path / "missing", questions, 5)


def test_the_plain_model_is_left_as_it_was(finished, loaded, prompts):
    model, processor = loaded
    text = tiny.prompt(processor, "what colour is the ring?")
    inputs = processor(images=prompts[0].image, text=text, return_tensors="pt")
    with torch.inference_mode():
        before = model(**inputs).logits
        assert torch.equal(before, tiny.load()[0](**inputs).logits)
