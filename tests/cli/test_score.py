"""`autoprune score` prints figures with intervals, says what is missing, and ends with code 1 then."""

from __future__ import annotations

import json

import pytest


@pytest.fixture
def gqa(tmp_path):
    """Forty questions whose answer is yes."""
    path = tmp_path / "questions.json"
    path.write_text(json.dumps({str(i): {"answer": "yes"} for i in range(40)}))
    return path


@pytest.fixture
def answers(tmp_path):
    def write(texts, name="answers.jsonl"):
        path = tmp_path / name
        lines = [{"question_id": i, "prompt": "?", "text": text} for i, text in texts.items()]
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        return path

    return write


def test_a_table_with_an_interval(call, gqa, answers):
    given = answers({i: "Yes" if i < 30 else "no" for i in range(40)})
    found = call("score", "gqa", "--answers-file", given, "--annotations", gqa)
    assert (found.code, found.err) == (0, "")
    line = next(line for line in found.out.splitlines() if line.startswith("accuracy"))
    value, low, high, count = (part for part in line.replace("│", " ").split() if part[0].isdigit())
    assert (value, count) == ("75.00", "40")
    # Binomial: 75 +- 1.96 * sqrt(75 * 25 / 40).
    assert float(low) == pytest.approx(61.6, abs=2)
    assert float(high) == pytest.approx(88.4, abs=2)


def test_missing_answers_are_named_and_the_exit_code_is_1(call, gqa, answers):
    given = answers({**dict.fromkeys(range(33), "yes"), 50: ""})
    found = call("score", "gqa", "--answers-file", given, "--annotations", gqa)
    assert found.code == 1
    assert "82.50 %" in found.out
    missing, unknown = found.err.splitlines()
    assert missing == (
        "autoprune: 7 of 40 questions have no answer and count as wrong: 33, 34, 35, 36, 37 and 2 more "
        "(--json lists all)"
    )
    assert "1 answers belong to no question of the annotations and do not count: 50" in unknown


def test_json_lists_everything(call, gqa, answers):
    given = answers(dict.fromkeys(range(39), "yes"))
    other = answers({i: "yes" if i < 20 else "no" for i in range(40)}, "other.jsonl")
    found = call(
        "score", "gqa", "--answers-file", given, "--annotations", gqa, "--against", other, "--json"
    )  # fmt: skip
    assert found.code == 1
    assert found.record["missing"] == ["39"]
    assert found.record["figures"][0]["value"] == 97.5
    assert found.record["agreement"]["value"] == 50
    assert found.record["format"] == "gqa"


def test_questions_without_an_answer_can_be_left_out(call, gqa, answers):
    given = answers(dict.fromkeys(range(20), "yes"))
    found = call(
        "score", "gqa", "--answers-file", given, "--annotations", gqa, "--answered-only"
    )  # fmt: skip
    assert found.code == 0
    assert "100.00 %" in found.out
    assert found.err == "autoprune: 20 questions without an answer are left out\n"


def test_an_error_is_one_line(call, gqa, answers):
    given = answers({1: "yes"})
    found = call("score", "gqaa", "--answers-file", given, "--annotations", gqa)
    assert found.code == 2
    assert found.err == (
        "autoprune: there is no format 'gqaa'; choose one of textvqa, vqav2, vizwiz, gqa, pope, mme, "
        "scienceqa, coco-caption\n"
    )
