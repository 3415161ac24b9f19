"""Questions of a file are checked line by line; what is right does not hang on an article."""

from __future__ import annotations

import json
from collections import Counter

import pytest

from autoprune import tiny
from autoprune.evaluation import embedded_tasks, is_right, read_tasks

GOOD = {"image": "scene.png", "question": "what is it?", "answer": "a ring", "kind": "shape"}


@pytest.fixture
def write(tmp_path):
    """A task file beside a picture."""
    tiny.draw_scene(3).image.save(tmp_path / "scene.png")

    def write(*lines):
        path = tmp_path / "tasks.jsonl"
        texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
        path.write_text("\n".join(texts))
        return path

    return write


@pytest.mark.parametrize(
    ("prediction", "answers", "right"),
    [
        ("The red ring.", ("red ring",), True),
        ("  RED   ring ", ("a red ring",), True),
        ("red rings", ("red ring",), False),
        ("a red ring and more", ("red ring",), False),
        ("two", ("2", "two"), True),
        ("3.5", ("35",), False),
        ("3.5.", ("3.5",), True),
        ("1,000", ("1,000",), True),
        ("row 3 column 4", ("row 3, column 4",), True),
        ("A", ("a",), True),
        ("the", ("a",), False),
        ("", ("a",), False),
        ("5", ("-5",), False),
        ("(-5)", ("-5",), True),
        (".5", ("5",), False),
        ("-.5", ("-.5.",), True),
        ("_-5_", ("5",), False),
        ("\N{MINUS SIGN}5", ("-5",), True),
        ("...5", ("5",), True),
        ("row-3", ("row 3",), True),
        ("3-5", ("35",), False),
        ("", ("+",), False),
        ("-", ("+",), False),
        ("+", ("+",), True),
    ],
)
def test_what_is_right(prediction, answers, right):
    assert is_right(prediction, answers) is right


def test_the_embedded_models_own_measure_agrees():
    for _, question in tiny.heldout_questions(180, tiny.KINDS, seed=3):
        for given in (question.answer, question.answer.upper() + ".", "x " + question.answer):
            assert is_right(given, (question.answer,)) == tiny.is_correct(question, given)


def test_embedded_tasks_are_as_many_of_each_kind_and_drawn_by_seed():
    tasks = embedded_tasks(3, ["count", "sign"], seed=5)
    assert Counter(task.kind for task in tasks) == {"count": 3, "sign": 3}
    assert len({task.id for task in tasks}) == 6
    assert tasks[0].question == embedded_tasks(3, ["count", "sign"], seed=5)[0].question
    assert {t.kind for t in embedded_tasks(1)} == {*tiny.EASY, *tiny.HARD}
    with pytest.raises(ValueError, match="at least 1"):
        embedded_tasks(0)
    with pytest.raises(ValueError, match="kinds must be some of"):
        embedded_tasks(1, ["weather"])


def test_a_file_gives_one_task_per_line(write):
    path = write(GOOD, "", {**GOOD, "answer": ["ring", "circle"], "kind": "other"})
    first, second = read_tasks(path)
    assert (first.id, second.id) == ("1", "3")
    assert first.answers == ("a ring",)
    assert second.answers == ("ring", "circle")
    assert first.image == path.parent / "scene.png"


def test_numbers_are_answers_as_they_were_written(write):
    line = '{"image": "scene.png", "question": "how many?", "answer": [2, 2.50, "two", -3]}'
    first, second = read_tasks(write(line, {**GOOD, "answer": 2}))
    assert first.answers == ("2", "2.50", "two", "-3")
    assert second.answers == ("2",) and type(second.answers[0]) is str


def test_other_line_ends_may_stand_inside_a_text(write):
    (task,) = read_tasks(
        write(json.dumps({**GOOD, "question": "what\u2028is it?"}, ensure_ascii=False))
    )
    assert task.question == "what\u2028is it?"


def test_a_file_without_kinds_is_one_kind(write):
    (task,) = read_tasks(write({k: v for k, v in GOOD.items() if k != "kind"}))
    assert task.kind == "all"


def test_kinds_and_numbers_choose_from_a_file(write):
    path = write(GOOD, GOOD, {**GOOD, "kind": "other"})
    assert [task.id for task in read_tasks(path, per_kind=1)] == ["1", "3"]
    assert [task.id for task in read_tasks(path, kinds=["shape"])] == ["1", "2"]
    with pytest.raises(ValueError, match="has no kind 'sum'; it has shape, other"):
        read_tasks(path, kinds=["sum"])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2 is no JSON"),
        ([1], "line 2: expected an object"),
        ({**GOOD, "image": "none.png"}, "line 2, image: there is no file"),
        ({**GOOD, "image": 7}, "line 2, image: expected a text, got 7"),
        ({**GOOD, "question": " "}, "line 2, question: expected a text"),
        ({**GOOD, "answer": None}, "line 2, answer: expected a text, a number or a list of them"),
        ({**GOOD, "answer": []}, "line 2, answer"),
        ({**GOOD, "answer": ["ring", None]}, "line 2, answer"),
        ({**GOOD, "answer": True}, "line 2, answer"),
        ({**GOOD, "kind": 1}, "line 2, kind: expected a text, got 1"),
    ],
)
def test_a_bad_line_is_named_with_its_field(write, line, message):
    with pytest.raises(ValueError, match=message):
        read_tasks(write(GOOD, line))


def test_a_file_that_is_missing_or_empty(write, tmp_path):
    with pytest.raises(ValueError, match="there is no task file"):
        read_tasks(tmp_path / "none.jsonl")
    with pytest.raises(ValueError, match="there are no tasks"):
        read_tasks(write("", ""))
