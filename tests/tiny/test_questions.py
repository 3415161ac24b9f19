"""Questions: right by an independent reading of the scene, balanced, and labelled."""

import random
import re
from collections import Counter

import pytest

from autoprune.tiny import (
    EASY,
    HARD,
    KINDS,
    Question,
    ask,
    draw_scene,
    heldout_questions,
    is_correct,
)
from autoprune.tiny.questions import EXTRA
from tests.tiny.scene_objects import of_kind

SINGULAR = {"circles": "circle", "squares": "square", "triangles": "triangle"}
SINGULAR |= {"crosses": "cross", "rings": "ring"}
PAIR = r"(?:an? |the )?(\w+) (\w+)"


@pytest.fixture(scope="module")
def asked():
    scenes = [draw_scene(seed) for seed in range(300)]
    return [(scene, question) for scene in scenes for question in ask(scene, scene.seed)]


def shapes(scene, name):
    """Shapes of a shape's name, a colour's name, or a plural such as "red shapes"."""
    name = SINGULAR.get(name, name.removesuffix(" shapes"))
    return [item for item in of_kind(scene, "shape") if name in (item.colour, item.shape)]


def named(scene, colour, shape):
    return [i for i in of_kind(scene, "shape") if (i.colour, i.shape) == (colour, shape)]


def yes(condition):
    return "yes" if condition else "no"


def answer_relation(scene, text):
    match = re.fullmatch(rf"is {PAIR} (left of|right of|above|below) {PAIR}\?", text)
    (first,), (second,) = named(scene, *match.group(1, 2)), named(scene, *match.group(4, 5))
    axis = 0 if "of" in match[3] else 1
    gap = second.box[axis] + second.box[axis + 2] - first.box[axis] - first.box[axis + 2]
    assert abs(gap) / 2 >= 8
    return yes(gap > 0 if match[3] in ("left of", "above") else gap < 0)


def answer_where(scene, text):
    if "digit" in text:
        (item,) = [i for i in of_kind(scene, "digit") if i.text in text]
    else:
        (item,) = named(scene, *text.removesuffix("?").split()[-2:])
    left, top, right, bottom = item.box
    return f"row {(top + bottom) // 2 // 8 + 1}, column {(left + right) // 2 // 8 + 1}"


def answer_side(scene, text):
    match = re.fullmatch(rf"is {PAIR} (?:on|at) the (left|right|top|bottom)\?", text)
    ((left, top, right, bottom),) = [item.box for item in named(scene, *match.group(1, 2))]
    twice = left + right if match[3] in ("left", "right") else top + bottom
    return yes(twice < 96 if match[3] in ("left", "top") else twice > 96)


def answer_describe(scene, text):
    words = []
    for item in sorted(scene.objects, key=lambda i: (i.box[0] + i.box[2], i.box[1] + i.box[3])):
        article = "an" if item.colour == "orange" else "a"
        words.append(
            {
                "shape": f"{article} {item.colour} {item.shape}",
                "digit": f"the digit {item.text}",
                "sign": f"a sign saying {item.text}",
            }[item.kind]
        )
    return ", ".join(words) + "."


def answer_compare(scene, text):
    first, second = re.fullmatch(r"are there more (.+) than (.+)\?", text).groups()
    return yes(len(shapes(scene, first)) > len(shapes(scene, second)))


ANSWERS = {
    "colour": lambda s, t: " ".join(i.colour for i in shapes(s, t[:-1].split()[-1])),
    "shape": lambda s, t: " ".join(i.shape for i in shapes(s, t[:-1].split()[-1])),
    "digit": lambda s, t: " ".join(i.text for i in of_kind(s, "digit")),
    "exists": lambda s, t: yes(named(s, *t[:-1].split()[-2:])),
    "count": lambda s, t: str(len(shapes(s, t[9:-11]))),
    "relation": answer_relation,
    "compare": answer_compare,
    "sign": lambda s, t: " ".join(i.text for i in of_kind(s, "sign")),
    "sum": lambda s, t: str(sum(int(i.text) for i in of_kind(s, "digit"))),
    "where": answer_where,
    "side": answer_side,
    "describe": answer_describe,
}


@pytest.mark.parametrize("kind", KINDS)
def test_answers_agree_with_the_scene(asked, kind):
    questions = [(scene, q) for scene, q in asked if q.kind == kind]
    assert len(questions) > 80
    for scene, question in questions:
        assert question.answer == ANSWERS[kind](scene, question.text), (scene.seed, question)


def test_every_kind_has_its_difficulty(asked):
    assert set(KINDS) == {*EASY, *HARD, *EXTRA} and len(KINDS) == 12
    labels = {question.kind: question.difficulty for _, question in asked}
    assert {kind for kind, label in labels.items() if label == "easy"} == set(EASY)
    assert {kind for kind, label in labels.items() if label == "hard"} == set(HARD)


def test_heldout_questions_are_balanced_over_kinds_and_answers():
    kinds = ["exists", "relation", "compare", "side", "count"]
    questions = [question for _, question in heldout_questions(300, kinds)]
    assert Counter(q.kind for q in questions) == dict.fromkeys(kinds, 60)
    for kind, answers in (
        ("exists", ["yes", "no"]),
        ("relation", ["yes", "no"]),
        ("compare", ["yes", "no"]),
        ("side", ["yes", "no"]),
        ("count", ["0", "1", "2", "3", "4", "5"]),
    ):
        counts = Counter(q.answer for q in questions if q.kind == kind)
        assert set(counts) == set(answers)
        assert max(counts.values()) - min(counts.values()) <= 1


def test_heldout_questions_come_from_different_heldout_scenes():
    pairs = heldout_questions(60)
    assert {scene.split for scene, _ in pairs} == {"heldout"}
    assert Counter(question.kind for _, question in pairs[:54]) == dict.fromkeys(EASY + HARD, 6)
    assert len({scene.seed for scene, _ in pairs}) == 60
    again = heldout_questions(60)
    assert [question for _, question in pairs] == [question for _, question in again]
    other = {scene.seed for scene, _ in heldout_questions(60, seed=1)}
    assert other.isdisjoint(scene.seed for scene, _ in pairs)


def test_no_to_exists_is_hard(asked):
    """Something of the colour or of the shape is there, so neither alone gives the answer."""
    absent = [(s, q) for s, q in asked if q.kind == "exists" and q.answer == "no"]
    for scene, question in absent:
        colour, shape = question.text[:-1].split()[-2:]
        assert shapes(scene, colour) or shapes(scene, shape)


def test_ask_is_reproducible_and_takes_kinds():
    scene = draw_scene(3)
    assert ask(scene, 1) == ask(scene, random.Random(1))
    assert [q.kind for q in ask(scene, 1, ["count", "exists"])] == ["count", "exists"]
    with pytest.raises(ValueError, match=r"kinds must be some of .*'riddle'"):
        ask(scene, 1, ["riddle"])


@pytest.mark.parametrize(
    ("given", "right"),
    [("KT", True), (" kt. ", True), ("K T", False), ("TK", False), ("", False), ("KTX", False)],
)
def test_is_correct_forgives_case_space_and_full_stop_only(given, right):
    assert is_correct(Question("sign", "hard", "what does the sign say?", "KT"), given) is right
