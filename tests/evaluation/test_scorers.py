"""Scores of files of answers: the numbers are worked out by hand from the data sets' own formulas."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from autoprune.evaluation.scorers import FORMATS, Sources, score
from autoprune.evaluation.scorers.answer_text import evalai, soft_accuracy
from autoprune.evaluation.scorers.figures import mean
from autoprune.evaluation.scorers.mme import said
from autoprune.evaluation.scorers.pope import says_yes
from autoprune.evaluation.scorers.reading import Answer
from autoprune.evaluation.scorers.scienceqa import letter
from autoprune.evaluation.scorers.textvqa import asked
from autoprune.evaluation.statistics import bootstrap

SHORT = "\nAnswer the question using a single word or phrase."


def write_lines(path: Path, records) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def write_json(path: Path, value) -> Path:
    path.write_text(json.dumps(value))
    return path


def answers(folder: Path, texts, name: str = "answers.jsonl") -> Path:
    """Answers by their ids, or as (id, prompt, text)."""
    rows = texts.items() if isinstance(texts, dict) else texts
    records = [
        {"question_id": row[0], "prompt": row[1] if len(row) == 3 else "", "text": row[-1]}
        for row in rows
    ]
    return write_lines(folder / name, records)


def values(found) -> dict[str, float | None]:
    return {figure.name: figure.value for figure in found.figures}


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("The red ring.", "red ring"),
        ("Two dogs, and a cat?", "2 dogs and cat"),
        ("None", "0"),
        ("1,000", "1000"),
        ("3.5", "3.5"),
        ("5.", "5"),
        ("no. 7", "no 7"),
        ("dont", "don't"),
        ("Coca-Cola", "coca cola"),
        # A space beside one dash takes away the other one as well.
        ("coca-cola - light", "cocacola light"),
        ("bob's", "bob 's"),
        ("a\nb\tthe c", "b c"),
        ("the", ""),
        ("", ""),
    ],
)
def test_evalai_leaves_what_the_released_processor_leaves(text, left):
    assert evalai(text) == left


@given(st.lists(st.sampled_from("abc"), min_size=1, max_size=12), st.sampled_from("abcd"))
def test_soft_accuracy_leaves_out_each_person_in_turn(people, prediction):
    slow = []
    for left_out in range(len(people)):
        others = [answer for index, answer in enumerate(people) if index != left_out]
        slow.append(min(1.0, others.count(prediction) / 3))
    assert soft_accuracy(prediction, people) == pytest.approx(sum(slow) / len(slow))


@pytest.mark.parametrize(
    ("matches", "value"), [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (10, 1)]
)
def test_soft_accuracy_of_ten_people(matches, value):
    people = ["yes"] * matches + ["no"] * (10 - matches)
    assert soft_accuracy("yes", people) == pytest.approx(value)


def textvqa(folder: Path) -> Sources:
    people = ["Stop", "stop.", "the stop", *["halt"] * 7]
    data = [
        {"image_id": "p1", "question": "What does it say?", "question_id": 1, "answers": people},
        {"image_id": "p1", "question": "What Brand?", "question_id": 2, "answers": ["nokia"] * 10},
        {"image_id": "p2", "question": "What brand?", "question_id": 3, "answers": ["7up"] * 10},
    ]
    return Sources(write_json(folder / "val.json", {"data": data}))


def test_textvqa_finds_the_question_by_picture_and_prompt(tmp_path):
    given = [
        ("p2", "What brand?" + SHORT, "7up"),
        ("p1", "What brand?\nReference OCR token: NOKIA, x" + SHORT, "Nokia."),
        ("p1", "Reference OCR token: stop\nwhat does it say?" + SHORT, "A STOP"),
    ]
    found = score("textvqa", answers(tmp_path, given), textvqa(tmp_path))
    # Three of ten people say "stop": .9; the others are right.
    assert values(found) == {"accuracy": pytest.approx(100 * 2.9 / 3)}
    assert found.missing == found.unknown == []


def test_prompts_of_textvqa():
    for prompt in (
        "What Is it?\nAnswer.",
        "What is it?\nReference OCR token: a, b\nAnswer.",
        "Reference OCR token: a, b\nWhat is it?\nAnswer.",
        "OCR tokens: a. Question: What is it? Short answer:",
    ):
        assert asked(Answer("1", prompt, "", 1)) == "what is it?"
    with pytest.raises(ValueError, match="line 4 of the answers: the prompt 'What is it'"):
        asked(Answer("1", "What is it", "", 4))


def test_questions_that_are_asked_twice_take_the_last_answers(tmp_path):
    record = {"image_id": "p", "question": "q?", "question_id": 1}
    data = [record | {"answers": ["old"] * 10}, record | {"answers": ["new"] * 10}]
    sources = Sources(write_json(tmp_path / "val.json", {"data": data}))
    given = [("p", "q?" + SHORT, "new"), ("p", "q?" + SHORT, "old")]
    assert values(score("textvqa", answers(tmp_path, given), sources)) == {"accuracy": 50}


def vqa_record(name, people, kind):
    listed = [{"answer": answer, "answer_id": i} for i, answer in enumerate(people, 1)]
    return {"question_id": name, "answers": listed, "answer_type": kind, "question_type": "what"}


def test_vqav2_processes_people_only_where_they_differ(tmp_path):
    records = [
        # All say the same, so it is taken as it is written: "it's" is not "it 's".
        vqa_record(1, ["it's"] * 10, "other"),
        # They differ: "two" and "2" are the same then.
        vqa_record(2, ["two"] * 2 + ["2"] * 2 + ["3"] * 6, "number"),
        vqa_record(3, ["yes"] * 3 + ["no"] * 7, "yes/no"),
        vqa_record(4, ["two"] * 10, "number"),
    ]
    sources = Sources(write_json(tmp_path / "a.json", {"annotations": records}))
    given = answers(tmp_path, {"1": "it's", 2: "Two.", "3": "Yes", "4": "two"})
    found = values(score("vqav2", given, sources))
    assert found == {
        "accuracy": pytest.approx(100 * (0 + 1 + 0.9 + 0) / 4),
        "accuracy, number": 50,
        "accuracy, other": 0,
        "accuracy, yes/no": pytest.approx(90),
    }


def test_vizwiz_processes_both_sides_and_takes_ids_from_the_questions(tmp_path):
    def record(image, people, kind="other"):
        listed = [{"answer": answer, "answer_confidence": "yes"} for answer in people]
        return {"image": image, "question": "?", "answers": listed, "answer_type": kind}

    data = [record("a.jpg", ["The Coke"] * 10), record("b.jpg", ["x"] * 8 + ["Two", "2"])]
    path = write_json(tmp_path / "val.json", data)
    by_picture = answers(tmp_path, {"a.jpg": "coke", "b.jpg": "two"})
    assert values(score("vizwiz", by_picture, Sources(path)))["accuracy"] == pytest.approx(80)
    questions = write_lines(
        tmp_path / "q.jsonl",
        [{"question_id": 7, "image": "a.jpg"}, {"question_id": 8, "image": "b.jpg"}],
    )
    by_id = answers(tmp_path, {7: "coke", "8": "two"}, "by_id.jsonl")
    assert values(score("vizwiz", by_id, Sources(path, questions)))["accuracy"] == pytest.approx(80)


def gqa(folder: Path) -> Sources:
    def record(answer, structural, semantic, balanced=True):
        types = {"structural": structural, "semantic": semantic, "detailed": "x"}
        return {"question": "?", "answer": answer, "isBalanced": balanced, "types": types}

    return Sources(
        write_json(
            folder / "gqa.json",
            {
                "201": record("yes", "verify", "attr"),
                "202": record("no", "logical", "rel"),
                "203": record("traffic light", "query", "rel"),
                "204": record("car", "query", "cat"),
                "205": record("car", "query", "cat", balanced=False),
            },
        )
    )


def test_gqa_is_exact_match_in_lower_case_without_the_last_point(tmp_path):
    given = answers(tmp_path, {201: "Yes.", "202": "yes", "203": "Traffic Light", "204": ".car"})
    found = score("gqa", given, gqa(tmp_path))
    assert values(found) == {
        "accuracy": 50,
        "accuracy, binary": 50,
        "accuracy, open": 50,
        "accuracy, semantic attr": 100,
        "accuracy, semantic cat": 0,
        "accuracy, semantic rel": 50,
        "accuracy, structural logical": 0,
        "accuracy, structural query": 50,
        "accuracy, structural verify": 100,
    }
    assert found.questions == 4


@pytest.mark.parametrize(
    ("text", "yes"),
    [
        ("Yes, there is a dog.", True),
        ("No", False),
        ("no, there is none", False),
        ("There is not a dog.", False),
        ("Yes. There is no cat.", True),
        # The released rule looks for words, and anything else is a yes.
        ("NO", True),
        ("nothing", True),
        ("", True),
    ],
)
def test_pope_takes_everything_for_a_yes_that_is_no_no(text, yes):
    assert says_yes(text) is yes


def pope(folder: Path) -> Sources:
    """Two categories of four questions each; ids of the question file."""
    labels = {"popular": ["yes", "yes", "no", "no"], "random": ["yes", "no", "no", "no"]}
    questions, name = [], 0
    annotations = folder / "pope"
    annotations.mkdir()
    for category, listed in labels.items():
        records = []
        for place, label in enumerate(listed, 1):
            name += 1
            image = f"{category}{place}.jpg"
            records.append({"question_id": place, "image": image, "text": "?", "label": label})
            questions.append(
                {"question_id": name, "image": image, "text": "?", "category": category}
            )
        write_lines(annotations / f"coco_pope_{category}.json", records)
    return Sources(annotations, write_lines(folder / "questions.jsonl", questions))


def test_pope_by_hand(tmp_path):
    texts = ["Yes", "No", "Yes", "No", "Yes", "No", "No", "Yes"]
    given = answers(tmp_path, dict(enumerate(texts, 1)))
    found = values(score("pope", given, pope(tmp_path)))
    # popular: 1 true yes, 1 false no, 1 false yes, 1 true no. random: 1 true yes, 2 true no, 1 false yes.
    assert found == {
        "accuracy, popular": 50, "precision, popular": 50, "recall, popular": 50, "F1, popular": 50,
        "yes ratio, popular": 50,
        "accuracy, random": 75, "precision, random": 50, "recall, random": 100,
        "F1, random": pytest.approx(200 / 3), "yes ratio, random": 50,
        "accuracy, mean of categories": 62.5, "precision, mean of categories": 50,
        "recall, mean of categories": 75, "F1, mean of categories": pytest.approx(350 / 6),
        "yes ratio, mean of categories": 50,
    }  # fmt: skip


def test_pope_without_a_yes_has_no_precision_and_a_missing_answer_is_wrong(tmp_path):
    lines = [
        {"question_id": i, "label": label} for i, label in enumerate(["yes", "no", "no", "yes"])
    ]
    sources = Sources(write_lines(tmp_path / "labels.jsonl", lines))
    never = values(score("pope", answers(tmp_path, dict.fromkeys(range(4), "no")), sources))
    assert (never["accuracy, all"], never["precision, all"], never["F1, all"]) == (50, None, 0)
    partly = score("pope", answers(tmp_path, {0: "yes", 1: "no"}), sources)
    # One of two that are there, one of one that was said, two of four right.
    assert values(partly) == {
        "accuracy, all": 50,
        "precision, all": 100,
        "recall, all": 50,
        "F1, all": pytest.approx(100 * 2 * 1 * 0.5 / 1.5),
        "yes ratio, all": 25,
    }
    assert partly.missing == ["2", "3"]


def test_pope_refuses_files_that_do_not_belong_together(tmp_path):
    sources = pope(tmp_path)
    given = answers(tmp_path, {1: "yes"})
    with pytest.raises(ValueError, match=r"--question-file llava_pope_test\.jsonl"):
        score("pope", given, Sources(sources.annotations))
    lines = sources.question_file.read_text().splitlines()
    sources.question_file.write_text("\n".join([lines[1], lines[0], *lines[2:]]))
    with pytest.raises(
        ValueError, match=r"line 1 is about popular1\.jpg, and the question .*popular2"
    ):
        score("pope", given, sources)
    sources.question_file.write_text("\n".join(lines[:-1]))
    with pytest.raises(ValueError, match=r"has 4 labels and questions\.jsonl 3 questions"):
        score("pope", given, sources)


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("Yes", "yes"),
        ("no.", "no"),
        ("A: yes", "other"),
        (" Yes", "yes"),
        ("", "other"),
        ("Not", "no"),
    ],
)
def test_mme_looks_at_the_first_four_characters(text, what):
    assert said(text) == what


def mme(folder: Path) -> Sources:
    """Two pictures of one task in its own folders, one of another in a flat one."""
    release = folder / "MME"
    texts = release / "existence" / "questions_answers_YN"
    texts.mkdir(parents=True)
    (release / "existence" / "images").mkdir()
    flat = release / "code_reasoning"
    flat.mkdir()
    lines = "Is there a dog? Please answer yes or no.\tYes\nIs there a cat? Please answer yes or no.\tNo\n"
    for path in (texts / "01.txt", texts / "02.txt"):
        path.write_text(lines)
    # Two spaces, as in some files of the release.
    flat_lines = "Is it 1?  Please answer yes or no.\tYes\nIs it 2?  Please answer yes or no.\tNo"
    (flat / "c.txt").write_text(flat_lines)
    return Sources(release)


def mme_answers(folder: Path, *said_) -> Path:
    asked_ = [
        ("existence/01.jpg", "Is there a dog? Please answer yes or no." + SHORT),
        ("existence/01.jpg", "Is there a cat? Please answer yes or no." + SHORT),
        ("existence/images/02.jpg", "Is there a dog?" + SHORT),
        ("existence/02.jpg", "Is there a cat?" + SHORT),
        ("code_reasoning/c.png", "Is it 1?" + SHORT),
        ("code_reasoning/c.png", "Is it 2?" + SHORT),
    ]
    rows = [(*question, text) for question, text in zip(asked_, said_, strict=True)]
    return answers(folder, [row for row in rows if row[2] is not None])


def test_mme_by_hand(tmp_path):
    given = mme_answers(tmp_path, "Yes", "No", "Yes", "Yes", "No", "no")
    found = score("mme", given, mme(tmp_path))
    # existence: 3 of 4 and 1 of 2 pictures, 75 + 50; code_reasoning: 1 of 2 and 0 of 1, 50 + 0.
    assert values(found) == {
        "perception": 125, "cognition": 50, "perception + cognition": 175,
        "score, existence": 125, "accuracy, existence": 75, "accuracy+, existence": 50,
        "score, code_reasoning": 50, "accuracy, code_reasoning": 50, "accuracy+, code_reasoning": 0,
    }  # fmt: skip
    assert any(
        "not in the sums, as there are no questions: count, position" in n for n in found.notes
    )


def test_a_missing_answer_of_mme_is_wrong_and_named(tmp_path):
    found = score(
        "mme", mme_answers(tmp_path, "Yes", None, "Yes", "No", "Yes", "No"), mme(tmp_path)
    )
    assert values(found)["score, existence"] == 75 + 50
    assert found.missing == ["existence 01.txt Is there a cat? Please answer yes or no."]


def test_mme_as_one_file(tmp_path):
    lines = [
        {"question_id": i, "image": f"{i // 2}.jpg", "category": "count", "label": label}
        for i, label in enumerate(["Yes", "No"] * 2)
    ]
    path = write_lines(tmp_path / "mme.jsonl", lines)
    given = answers(tmp_path, {0: "yes", 1: "no", 2: "yes", 3: "perhaps"})
    assert values(score("mme", given, Sources(path)))["score, count"] == 75 + 50
    write_lines(path, lines[:3])
    with pytest.raises(
        ValueError, match=r"2 questions about each picture, and count has 1 about 1\.jpg"
    ):
        score("mme", given, Sources(path))


@pytest.mark.parametrize(
    ("text", "chosen"),
    [
        ("B", "B"),
        (" C", "C"),
        ("C\n", "C"),
        # The released rule turns the end of the line into a point, behind which " C. " is no letter.
        (" C\n", None),
        ("A. whales", "A"),
        ("A\nbecause", "A"),
        ("Both. The answer is D.", "D"),
        ("The answer is A or so. The answer is B.", "B"),
        ("The answer is E", "E"),
        ("(B)", None),
        ("B) whales", None),
        ("F", None),
        ("AB", None),
        ("the answer is B.", None),
        ("", None),
    ],
)
def test_the_letter_of_scienceqa(text, chosen):
    assert letter(text) == chosen


def scienceqa(folder: Path) -> Sources:
    problems = {
        "1": {"answer": 0, "choices": ["x", "y"], "image": "image.png"},
        "2": {"answer": 1, "choices": ["x", "y"], "image": None},
        "3": {"answer": 2, "choices": ["x", "y", "z"], "image": "image.png"},
        "4": {"answer": 0, "choices": ["x", "y"], "image": None},
    }
    write_json(folder / "problems.json", problems)
    write_json(folder / "pid_splits.json", {"test": ["1", "2", "3"], "val": ["4"]})
    return Sources(folder)


def test_scienceqa_over_all_and_over_questions_with_an_image(tmp_path):
    found = score(
        "scienceqa", answers(tmp_path, {1: "A", "2": "C", "3": "well"}), scienceqa(tmp_path)
    )
    assert values(found) == {"accuracy": pytest.approx(100 / 3), "accuracy, with an image": 50}
    assert found.notes == ["1 answers name no letter and count as wrong"]
    with pytest.raises(ValueError, match=r"no split 'train'; pid_splits\.json has test, val"):
        score("scienceqa", tmp_path / "answers.jsonl", Sources(tmp_path, split="train"))


def test_missing_answers_do_not_make_the_denominator_smaller(tmp_path):
    given = answers(tmp_path, {"201": "yes", "203": "traffic light", "999": "x"})
    found = score("gqa", given, gqa(tmp_path))
    assert values(found)["accuracy"] == 50
    assert (found.questions, found.missing, found.unknown) == (4, ["202", "204"], ["999"])
    part = score("gqa", given, gqa(tmp_path), answered_only=True)
    assert values(part)["accuracy"] == 100
    assert (part.questions, part.missing, part.left_out) == (2, [], 2)


def test_a_question_that_is_answered_twice_is_refused(tmp_path):
    given = answers(tmp_path, [(201, "yes"), (202, "no"), ("201", "no")])
    with pytest.raises(ValueError, match=r"question 201 is answered more than once \(lines 1, 3\)"):
        score("gqa", given, gqa(tmp_path))


def test_agreement_is_the_share_of_equal_normalised_texts(tmp_path):
    own = answers(tmp_path, {201: "Yes.", 202: "no", 203: "the light", 204: "-5"})
    other = answers(tmp_path, {201: "yes", 202: "yes", 203: "light", 204: "5"}, "other.jsonl")
    found = score("gqa", own, gqa(tmp_path), other)
    assert found.agreement.value == 50
    short = answers(tmp_path, {201: "yes"}, "short.jsonl")
    with pytest.raises(ValueError, match="has no answer to 3 of the 4 questions, such as '202'"):
        score("gqa", own, gqa(tmp_path), short)


def test_two_missing_answers_do_not_agree(tmp_path):
    own = answers(tmp_path, {201: "yes", 202: "no", 203: "x"})
    other = answers(tmp_path, {201: "yes", 202: "no", 203: "x", 204: ""}, "other.jsonl")
    assert score("gqa", own, gqa(tmp_path), other).agreement.value == 75


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "there are no answers in"),
        ("{", "answers.jsonl, line 1 is no JSON"),
        ("[1]", "line 1: expected a JSON object"),
        ('{"text": "yes"}', "line 1, question_id: expected a number or a text, got None"),
        ('{"question_id": true, "text": "yes"}', "question_id: expected a number or a text"),
        ('\n{"question_id": 1, "text": null}', "line 2: expected text and prompt to be strings"),
        (
            '{"question_id": 77, "text": "yes"}',
            "no answer of .* belongs to a question .*'201'.*'77'",
        ),
    ],
)
def test_answers_of_another_form(tmp_path, content, message):
    path = tmp_path / "answers.jsonl"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        score("gqa", path, gqa(tmp_path))


def test_what_is_asked_for_in_error_is_said(tmp_path):
    given = answers(tmp_path, {1: "yes"})
    with pytest.raises(ValueError, match=f"no format 'vqa'; choose one of {', '.join(FORMATS)}"):
        score("vqa", given, Sources(tmp_path))
    with pytest.raises(ValueError, match="gqa reads no question file, only vizwiz and pope do"):
        score("gqa", given, Sources(tmp_path, tmp_path))
    with pytest.raises(ValueError, match="there is no file of annotations"):
        score("gqa", given, Sources(tmp_path / "missing.json"))
    with pytest.raises(ValueError, match="is a folder; give the file of the annotations"):
        score("gqa", given, Sources(tmp_path))
    for name in ("textvqa", "vqav2", "vizwiz", "gqa"):
        with pytest.raises(ValueError, match=r"annotations\.json.*expected"):
            score(name, given, Sources(write_json(tmp_path / "annotations.json", 3)))


def test_empty_answers_are_counted(tmp_path):
    found = score(
        "gqa", answers(tmp_path, {201: "", 202: " ", 203: "x", 204: "car"}), gqa(tmp_path)
    )
    assert found.empty == 2
    assert values(found)["accuracy"] == 25


def test_the_interval_is_that_of_a_bootstrap_over_questions():
    rng = np.random.default_rng(5)
    scores = rng.choice([0, 0.3, 0.6, 0.9, 1], size=400).tolist()
    found = mean("accuracy", scores)
    usual = bootstrap([[scores]], ["all"] * 400)[0].micro.estimate(0)
    assert found.value == pytest.approx(100 * usual.value)
    assert found.low == pytest.approx(100 * usual.low, abs=0.5)
    assert found.high == pytest.approx(100 * usual.high, abs=0.5)
    assert mean("accuracy", scores[:9]).low is None
