"""Senna's planning task: its question, its answers, its data files, and both ways to count."""

from __future__ import annotations

import json

import pytest

from autoprune import AutoPrune
from autoprune.loading import load_model
from autoprune.models.senna.convert import convert
from autoprune.models.senna.planning import (
    Plan,
    evaluate_plans,
    parse_plan,
    planning_question,
    read_samples,
    score_plans,
    upstream_f1,
)
from tests.models import senna_checkpoint as tiny

KEEP, STOP = Plan("KEEP", "STRAIGHT"), Plan("STOP", "LEFT_TURN")


def test_the_question_is_that_of_the_training_data():
    assert planning_question(7.9, "turn left") == (
        "Your current speed is 7 m/s, the navigation command is 'turn left', based on the understanding of "
        "the driving scene and the navigation information, what is your plan for the next three seconds? "
        "Please answer your SPEED plan and your PATH plan. SPEED includes KEEP, ACCELERATE and DECELERATE, "
        "and STOP, PATH includes STRAIGHT, RIGHT_CHANGE, LEFT_CHANGE, RIGHT_TURN, LEFT_TURN. For example, "
        "a correct answer format is like 'KEEP, LEFT_CHANGE'."
    )


@pytest.mark.parametrize("speed", [-1, float("nan"), float("inf"), "fast", True])
def test_a_speed_that_is_none_is_refused(speed):
    with pytest.raises(ValueError, match="must be a number of m/s, 0 or more"):
        planning_question(speed, "go straight")


def test_another_command_is_refused():
    with pytest.raises(
        ValueError, match="must be one of go straight, turn left, turn right, got 'fly'"
    ):
        planning_question(3, "fly")


@pytest.mark.parametrize("answer", ["KEEP, STRAIGHT", " KEEP, STRAIGHT\n"])
def test_a_plan_is_read(answer):
    assert parse_plan(answer) == KEEP
    assert str(KEEP) == "KEEP, STRAIGHT"


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "KEEP",
        "keep, straight",
        "STRAIGHT, KEEP",
        "KEEP, STRAIGHT.",
        "I KEEP, STRAIGHT",
        "KEEP,STRAIGHT",
    ],
)
def test_another_form_is_no_plan(answer):
    with pytest.raises(ValueError, match="is no plan: expected one of KEEP"):
        parse_plan(answer)


def test_both_rules_count_by_hand():
    answers = [
        "KEEP, STRAIGHT",  # right
        "I would STOP and take the LEFT_TURN",  # holds the words, but is no plan
        "STOP, LEFT_TURN",  # of KEEP, STRAIGHT: wrong
        "STOP, STRAIGHT",  # of STOP, LEFT_TURN: half
    ]
    score = score_plans(answers, [KEEP, STOP, KEEP, STOP])
    assert score.samples == 4
    assert score.accuracy == 1 / 4
    assert score.unreadable == 1 / 4
    assert score.upstream_accuracy == 2 / 4
    # STOP: true in answers 2 and 4, false in 3. KEEP: true in 1, missed in 3.
    assert score.upstream_f1["STOP"] == pytest.approx(2 * 2 / (2 * 2 + 1 + 0))
    assert score.upstream_f1["KEEP"] == pytest.approx(2 * 1 / (2 * 1 + 0 + 1))
    # LEFT_TURN: true in 2, false in 3, missed in 4. STRAIGHT: true in 1, false in 4, missed in 3.
    assert score.upstream_f1["LEFT_TURN"] == pytest.approx(2 / (2 + 1 + 1))
    assert score.upstream_f1["STRAIGHT"] == pytest.approx(2 / (2 + 1 + 1))
    assert score.upstream_f1["RIGHT_TURN"] == score.upstream_f1["ACCELERATE"] == 0
    assert "RIGHT_CHANGE" not in score.upstream_f1


def test_the_authors_f1_calls_an_answer_with_every_word_right():
    pairs = [("KEEP STOP", "STOP"), ("KEEP STOP", "STOP")]
    assert upstream_f1("KEEP", pairs) == 1.0  # an ordinary F1 would be 0


def test_answers_and_plans_must_be_as_many():
    with pytest.raises(ValueError, match="got 1 for 2"):
        score_plans(["KEEP"], [KEEP, STOP])
    with pytest.raises(ValueError, match="got 0 for 0"):
        score_plans([], [])


def record(question: str = "", answer: str = "KEEP, STRAIGHT\n", images: int = 6) -> dict:
    question = question or planning_question(3, "go straight")
    places = "".join(f"<VIEW {n}>:\n<image>\n" for n in range(6))
    return {
        "token": "a1",
        "images": [f"{n}.png" for n in range(images)],
        "prev": "",
        "conversations": [
            {"from": "human", "value": places + question},
            {"from": "gpt", "value": answer},
        ],
    }


def written(tmp_path, content) -> str:
    path = tmp_path / "data.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return str(path)


def test_planning_questions_of_a_file_are_read(tmp_path):
    path = written(tmp_path, [record("What is the traffic light?", "Red\n"), record()])
    (sample,) = read_samples(path, tmp_path)
    assert sample.plan == KEEP
    assert sample.images == tuple(tmp_path / f"{n}.png" for n in range(6))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "cannot be read"),
        ({}, "holds no list of samples"),
        ([], "holds no planning question"),
        ([record("Anything?")], "holds no planning question"),
        ([record(), 3], "sample 1 of .* is not in Senna's format"),
        ([{"token": "a"}], "it lacks 'conversations'"),
        ([record(images=5)], "has 6 places for pictures, but there are 5"),
        ([record(answer="go on")], "sample 0 of .*: the answer 'go on' is no plan"),
        ([record() | {"images": None}], "its images are no list, but None"),
        ([record() | {"images": "abcdef"}], "its images are no list, but 'abcdef'"),
        ([record() | {"conversations": [1, 2]}], "format: 'int' object is not subscriptable"),
    ],
)
def test_a_file_of_another_form_is_refused_in_one_sentence(tmp_path, content, said):
    with pytest.raises(ValueError, match=said) as refused:
        read_samples(written(tmp_path, content))
    assert "\n" not in str(refused.value)


def test_a_file_of_endless_lists_is_refused(tmp_path):
    (tmp_path / "deep.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match="cannot be read"):
        read_samples(tmp_path / "deep.json")


def test_a_file_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(ValueError, match="cannot be read"):
        read_samples(tmp_path / "none.json")


def test_a_file_is_evaluated_with_and_without_pruning(tmp_path):
    for number, view in enumerate(tiny.views()):
        view.save(tmp_path / f"{number}.png")
    tiny.write_checkpoint(tmp_path / "upstream")
    convert(tmp_path / "upstream", tmp_path / "model")
    loaded = load_model(str(tmp_path / "model"), dtype="float32")
    samples = read_samples(
        written(tmp_path, [record(), record(answer="STOP, LEFT_TURN")]), tmp_path
    )
    for method in (None, AutoPrune(12, per_picture="equal")):
        score, answers = evaluate_plans(loaded.model, loaded.processor, samples, method, 3)
        assert score.samples == len(answers) == 2
        assert answers[0] == answers[1]  # one prompt, two labels
        assert score == score_plans(answers, [KEEP, STOP])
    samples[0].images[3].unlink()
    with pytest.raises(ValueError, match="there is no image file"):
        samples[0].messages()
