"""What is read of LLaVA's files: texts word for word, places, and what is wrong with a line."""

from __future__ import annotations

import json
import math
import tracemalloc
from pathlib import Path

import pytest

from autoprune import AutoPrune
from autoprune.evaluation.files import Asking
from autoprune.evaluation.files.questions import INSTRUCTIONS, Forward, QuestionFile

LETTER = "Answer with the option's letter from the given choices directly."
COLUMNS = ("index", "question", "hint", "A", "B", "C", "D", "answer", "category", "image")


def read(path, instruction=""):
    return list(QuestionFile(path, path.parent, instruction))


def table(path, *rows):
    lines = [COLUMNS, *rows]
    path.write_text("".join("\t".join(line) + "\n" for line in lines), encoding="utf-8")
    return path


def test_lines_are_taken_as_they_are(tmp_path):
    path = tmp_path / "q.jsonl"
    path.write_text(
        '\ufeff{"question_id": "code/1.png", "image": "code/1.png", "text": "Ja?\\nYes or no."}\r\n'
        "\n"
        '{"question_id": 2, "text": "中文"}',
        encoding="utf-8",
    )
    one, two = read(path)
    assert (one.position, one.id, one.text, one.prompt) == (
        0,
        "code/1.png",
        *["Ja?\nYes or no."] * 2,
    )
    assert one.image == tmp_path / "code/1.png" and not one.problem
    assert (two.position, two.id, two.text, two.image) == (1, 2, "中文", None)


@pytest.mark.parametrize(
    ("line", "name", "said"),
    [
        ("{", None, "line 2: no JSON"),
        ("[1]", None, "line 2: expected an object"),
        ("\udcff", None, "line 2: no text in UTF-8"),
        ('{"question_id": 7, "image": "x.png"}', 7, "line 2: text: expected a text, got None"),
        ('{"question_id": 7, "text": "  "}', 7, "line 2: text: expected a text, got '  '"),
        ('{"question_id": 7, "text": "a", "image": 3}', 7, "line 2: image: expected a text, got 3"),
        ('{"question_id": true, "text": "a"}', True, "line 2: question_id: expected"),
        ('{"text": "a"}', None, "line 2: question_id: expected a text or a number, got None"),
        ('{"question_id": 7, "text": "\\ud800"}', 7, "half a character"),
        ("[" * 100_000, None, "line 2: no JSON"),
    ],
)
def test_a_broken_line_is_told_with_its_id_and_the_others_stay(tmp_path, line, name, said):
    good = '{"question_id": 1, "text": "a"}'
    path = tmp_path / "q.jsonl"
    path.write_bytes("\n".join([good, line, good]).encode("utf-8", "surrogateescape"))
    first, broken, last = read(path)
    assert not first.problem and not last.problem and last.position == 2
    assert said in broken.problem and broken.id == name and broken.position == 1


def test_scienceqa_is_asked_as_llava_does(tmp_path):
    turns = [{"from": "human", "value": "Which is red?\n<image>"}, {"from": "gpt", "value": "A"}]
    items = [
        {"id": "4", "image": "4/image.png", "conversations": turns},
        {"id": "5", "conversations": [{"from": "human", "value": "Is 2 < 3?"}]},
        {"id": "6", "conversations": []},
    ]
    path = tmp_path / "llava_test_CQM-A.json"
    path.write_text(json.dumps(items, indent=2))
    shown, told, broken = read(path, LETTER)
    # eval_science_qa.py tells questions with pictures by "<image>" in the prompt.
    assert shown.text == f"Which is red?\n{LETTER}"
    assert shown.prompt == f"<image>\nWhich is red?\n{LETTER}"
    assert shown.image == tmp_path / "4/image.png" and shown.id == "4"
    assert told.text == told.prompt == f"Is 2 < 3?\n{LETTER}" and told.image is None
    assert broken.id == "6" and "conversations" in broken.problem
    assert read(path)[1].text == "Is 2 < 3?"


def test_items_longer_than_what_is_read_at_a_time_stay_whole(tmp_path):
    items = [
        {"id": str(n), "conversations": [{"value": f'"] {n}, ' + "x" * size}]}
        for n, size in enumerate([10, 65_530, 300_000, 5])
    ]
    path = tmp_path / "q.json"
    path.write_text("  " + json.dumps(items))
    assert [q.text for q in read(path)] == [item["conversations"][0]["value"] for item in items]


@pytest.mark.parametrize("text", ['[{"id": 1}', "[1 2", "[nope]"])
def test_a_json_file_that_ends_early_is_refused(tmp_path, text):
    path = tmp_path / "q.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"q\.json' is no list in JSON"):
        read(path)


def test_mmbench_is_asked_as_llava_does(tmp_path):
    path = table(
        tmp_path / "mmbench_dev.tsv",
        ("241", "Which one?", "Think.", "Na", "Mg", "nan", "K", "A", "x", "aGk="),
        ("242", '"Two\nlines ""quoted"""', "", "yes", "no", "N/A", "", "B", "x", "aGk="),
        ("243", "No picture?", "", "yes", "no", "", "", "B", "x", ""),
    )
    first, second, third = read(path, LETTER)
    # An option that is no value ends the list: K is not offered. Sodium is a value.
    assert first.prompt == "Think.\nWhich one?\nA. Na\nB. Mg"
    assert first.text == f"Think.\nWhich one?\nA. Na\nB. Mg\n{LETTER}"
    assert (first.id, first.image) == (241, b"aGk=")
    assert first.fields == {"round_id": 0, "options": ["Na", "Mg"], "option_char": ["A", "B"]}
    assert second.prompt == 'Two\nlines "quoted"\nA. yes\nB. no'
    assert third.problem.startswith("row 3: image") and third.id == "243"


def test_a_table_without_a_column_is_refused(tmp_path):
    path = tmp_path / "q.tsv"
    path.write_text("index\tquestion\tA\n")
    with pytest.raises(ValueError, match="has no column 'image'"):
        read(path)


def test_what_is_not_there_is_refused(tmp_path):
    path = tmp_path / "q.jsonl"
    path.write_text("{}")
    with pytest.raises(ValueError, match="no question file"):
        QuestionFile(tmp_path / "none", tmp_path)
    with pytest.raises(ValueError, match="no image folder"):
        QuestionFile(path, tmp_path / "none")
    with pytest.raises(ValueError, match="whose texts are complete"):
        QuestionFile(path, tmp_path, INSTRUCTIONS["en"])


def test_questions_are_found_by_position_forwards_and_backwards(tmp_path):
    path = tmp_path / "q.jsonl"
    path.write_text("".join(f'{{"question_id": {n}, "text": "{n}"}}\n' for n in range(10)))
    forward = Forward(QuestionFile(path, tmp_path))
    for wanted in ([0, 1], [4, 7], [9], [2], [2, 3], [0]):
        assert [question.id for question in forward.take(wanted)] == wanted


@pytest.mark.parametrize("count", [1, 7, 8, 9, 24])
@pytest.mark.parametrize("chunks", [1, 2, 3, 8])
def test_chunks_are_those_of_llavas_scripts(count, chunks):
    size = math.ceil(count / chunks)
    lists = [list(range(count))[start : start + size] for start in range(0, count, size)]
    for index in range(chunks):
        asking = Asking(Path("q"), Path(), AutoPrune(64), num_chunks=chunks, chunk_idx=index)
        assert list(asking.positions(count)) == (lists[index] if index < len(lists) else [])


@pytest.mark.parametrize("ending", ["jsonl", "json", "tsv"])
def test_reading_does_not_hold_the_file(tmp_path, ending):
    """Ten times the questions, the same memory."""

    def most(count):
        path = tmp_path / f"{count}.{ending}"
        if ending == "tsv":
            row = ("1", "Which one?", "", "a", "b", "", "", "A", "x", "a" * 4000)
            table(path, *[row] * count)
        elif ending == "json":
            item = {"id": "1", "conversations": [{"value": "x" * 500}]}
            path.write_text(json.dumps([item] * count))
        else:
            path.write_text('{"question_id": 1, "text": "%s"}\n' % ("x" * 500) * count)
        tracemalloc.start()
        assert sum(1 for _ in QuestionFile(path, tmp_path)) == count
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return peak

    most(10)
    assert most(4000) < most(400) + 100_000
