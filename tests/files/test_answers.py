"""Answers of a file: the right ones, in order, once, whatever happens to the process."""

from __future__ import annotations

import gc
import json
import shutil
import weakref
from contextlib import closing

import pytest
import torch
from PIL import Image

from autoprune import AutoPrune, tiny
from autoprune.errors import UnsupportedError
from autoprune.evaluation.files import Asking, answer_file, asking
from autoprune.evaluation.files.journal import Writer
from tests.files import data


def ask(folder, answers, **changes):
    settings = {"questions": folder / "q.jsonl", "images": folder / "images", "device": "cpu"}
    settings |= {"method": AutoPrune(16), "max_new_tokens": 16} | changes
    return answer_file(Asking(**settings), answers, say=lambda text: None)


@pytest.fixture(scope="module")
def unbroken(eight, tmp_path_factory):
    """The answers of one run, three at a time."""
    path = tmp_path_factory.mktemp("unbroken") / "a.jsonl"
    outcome = ask(eight, path, batch_size=3)
    assert (outcome.questions, outcome.failed) == (8, [])
    return path


def test_answers_are_the_models_own_and_in_llavas_shape(eight, unbroken):
    model, processor = tiny.load()
    given = data.read_lines(unbroken)
    asked = data.read_lines(eight / "q.jsonl")
    assert len(given) == len(asked) == 8
    for answer, question in zip(given, asked, strict=True):
        image = Image.open(eight / "images" / question["image"])
        with AutoPrune(16)(model) as trace:
            alone = tiny.answer(model, processor, image, question["text"], 16)
        assert list(answer) == [
            "question_id", "prompt", "text", "answer_id", "model_id", "metadata"
        ]  # fmt: skip
        assert (answer["question_id"], answer["prompt"]) == (
            question["question_id"],
            question["text"],
        )
        assert answer["text"] == alone and answer["model_id"] == "embedded"
        assert answer["metadata"] == {
            "method": "autoprune",
            "budget": "16 visual tokens per layer (mean entering)",
            "visual_tokens": 144,
            "mean_tokens": 16.0,
            "flops": trace.samples[0].total_flops,
        }
    assert len({answer["answer_id"] for answer in given}) == 8


@pytest.mark.parametrize("batch_size", [1, 8])
def test_the_batch_size_changes_nothing(eight, unbroken, tmp_path, batch_size):
    ask(eight, tmp_path / "a.jsonl", batch_size=batch_size)
    assert (tmp_path / "a.jsonl").read_bytes() == unbroken.read_bytes()


def test_chunks_join_to_the_whole(eight, unbroken, tmp_path):
    for index in range(3):
        ask(eight, tmp_path / f"3_{index}.jsonl", num_chunks=3, chunk_idx=index)
    parts = [(tmp_path / f"3_{index}.jsonl").read_bytes() for index in range(3)]
    assert [part.count(b"\n") for part in parts] == [3, 3, 2]
    assert b"".join(parts) == unbroken.read_bytes()


def test_a_limit_can_be_raised_and_only_the_rest_is_asked(eight, unbroken, tmp_path):
    path = tmp_path / "a.jsonl"
    whole = unbroken.read_bytes().splitlines(keepends=True)
    assert ask(eight, path, batch_size=3, limit=4).questions == 4
    assert path.read_bytes() == b"".join(whole[:4])
    ask(eight, path, batch_size=3)
    assert path.read_bytes() == b"".join(whole)
    assert asked_positions(path) == [[0, 1, 2], [3], [4, 5], [6, 7]]


def asked_positions(path):
    lines = data.read_lines(path.with_name(path.name + ".run") / "answers-0.jsonl")
    return [[position for position, _ in line["answers"]] for line in lines]


ONE_BY_ONE = ("--batch-size", 1, "--max-new-tokens", 16)


@pytest.fixture(scope="module")
def killed(eight, tmp_path_factory):
    """What a process of its own left that was killed after two answers or more."""
    folder = tmp_path_factory.mktemp("killed")
    command = data.words(eight, folder / "a.jsonl", *ONE_BY_ONE)
    data.kill_after(data.shell(*command), folder / "a.jsonl.run/answers-0.jsonl", 2)
    assert not (folder / "a.jsonl").exists()
    return folder


@pytest.mark.parametrize("torn", ["", '{"answers": [[4, {"quest', '{"answers": [], "failed": []}'])
def test_a_killed_run_goes_on_to_the_same_file(eight, killed, unbroken, tmp_path, call, torn):
    shutil.copytree(killed, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "a.jsonl"
    journal = tmp_path / "a.jsonl.run/answers-0.jsonl"
    before = journal.read_bytes()
    before = before[: before.rfind(b"\n") + 1]
    assert 2 <= before.count(b"\n") < 8
    journal.write_bytes(before + torn.encode())
    assert call(*data.words(eight, path, *ONE_BY_ONE))[0] == 0
    assert path.read_bytes() == unbroken.read_bytes()
    assert journal.read_bytes().startswith(before)
    assert asked_positions(path) == [[position] for position in range(8)]


def test_a_finished_run_is_not_asked_again(eight, unbroken, tmp_path, monkeypatch):
    path = tmp_path / "a.jsonl"
    ask(eight, path, batch_size=3)
    path.unlink()
    monkeypatch.setattr(asking, "load_embedded", None)
    assert ask(eight, path, batch_size=5).failed == []
    assert path.read_bytes() == unbroken.read_bytes()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"method": AutoPrune(20)}, r"method budget was 16 visual .* and is 20 visual"),
        ({"method": AutoPrune(16, k0=0.2)}, r"method k0 was .* and is 0\.2"),
        ({"max_new_tokens": 3}, "max_new_tokens was 16 and is 3"),
        ({"conversation": "vicuna_v1"}, "conversation was template and is vicuna_v1"),
        ({"num_chunks": 2}, "num_chunks was 1 and is 2"),
        ({"dtype": "float16"}, "dtype was auto and is float16"),
    ],
)
def test_answers_of_another_run_are_left_alone(eight, unbroken, changes, said):
    before = unbroken.read_bytes()
    with pytest.raises(ValueError, match=said) as error:
        ask(eight, unbroken, **changes)
    assert "a.jsonl.run' holds another run" in str(error.value)
    assert "give another answers file" in str(error.value)
    assert unbroken.read_bytes() == before


def test_other_questions_are_another_run(tmp_path):
    data.questions(tmp_path, 2)
    ask(tmp_path, tmp_path / "a.jsonl")
    data.questions(tmp_path, 2, first=1)
    with pytest.raises(ValueError, match="questions was"):
        ask(tmp_path, tmp_path / "a.jsonl")


def test_a_file_of_somebody_else_is_left_alone(eight, tmp_path):
    (tmp_path / "a.jsonl").write_text("mine")
    with pytest.raises(ValueError, match="is not of a run that can go on"):
        ask(eight, tmp_path / "a.jsonl")
    assert (tmp_path / "a.jsonl").read_text() == "mine"


def test_two_runs_do_not_write_to_one_file(eight, tmp_path):
    path = tmp_path / "a.jsonl"
    ask(eight, path, limit=1)
    writer = Writer(tmp_path / "a.jsonl.run/answers-0.jsonl")
    with closing(writer), pytest.raises(ValueError, match="another run writes to"):
        ask(eight, path, limit=2)
    assert ask(eight, path, limit=2).failed == []


def test_settings_that_do_not_work_leave_nothing_behind(eight, tmp_path):
    with pytest.raises(ValueError, match="no model folder"):
        ask(eight, tmp_path / "new/a.jsonl", model=str(tmp_path / "none"))
    assert not (tmp_path / "new").exists()
    ask(eight, tmp_path / "new/a.jsonl", limit=1)
    assert len(data.read_lines(tmp_path / "new/a.jsonl")) == 1


def test_what_is_broken_is_told_and_tried_again(tmp_path, call):
    """A missing picture, a torn one and a line that is none; then they are mended."""
    records = data.questions(tmp_path, 6)
    command = data.words(tmp_path, tmp_path / "whole.jsonl", "--batch-size", 4)
    assert call(*command)[0] == 0
    whole = (tmp_path / "whole.jsonl").read_bytes().splitlines(keepends=True)

    images, away = tmp_path / "images", tmp_path / "away.png"
    (images / "1.png").rename(away)
    torn = (images / "4.png").read_bytes()
    (images / "4.png").write_bytes(torn[: len(torn) // 2])
    command = data.words(tmp_path, tmp_path / "a.jsonl", "--batch-size", 4)
    code, out, err = call(*command)
    assert code == 1 and "4 of 6 questions answered" in out
    assert "2 questions have no answer" in err
    assert "question 101: there is no image file" in err and "question 104: image" in err
    kept = [line for at, line in enumerate(whole) if at not in (1, 4)]
    assert (tmp_path / "a.jsonl").read_bytes() == b"".join(kept)
    noted = data.read_lines(tmp_path / "a.jsonl.run/failed.jsonl")
    assert [(line["position"], line["question_id"]) for line in noted] == [(1, 101), (4, 104)]

    away.rename(images / "1.png")
    code, out, err = call(*command)
    assert code == 1 and "5 of 6" in out and "question 101" not in err
    (images / "4.png").write_bytes(torn)
    code, out, err = call(*command)
    assert code == 0 and "6 of 6" in out
    assert (tmp_path / "a.jsonl").read_bytes() == b"".join(whole)
    assert not (tmp_path / "a.jsonl.run/failed.jsonl").exists()
    assert asked_positions(tmp_path / "a.jsonl") == [[0, 2, 3], [5], [1], [], [4]]

    lines = [json.dumps(record) for record in records]
    (tmp_path / "q.jsonl").write_text("\n".join([*lines[:2], '{"question_id": 102', *lines[3:]]))
    code, out, err = call(*data.words(tmp_path, tmp_path / "b.jsonl", "--batch-size", 4))
    assert code == 1 and "5 of 6" in out and "question ?: line 3: no JSON" in err


def test_a_prompt_that_the_model_refuses_leaves_its_batch_alone(tmp_path):
    records = data.questions(tmp_path, 4)
    # A second place for a picture, and only one picture.
    records[2]["text"] = "<image> what is <image> there?"
    data.write_lines(tmp_path / "q.jsonl", records)
    outcome = ask(tmp_path, tmp_path / "a.jsonl", batch_size=4)
    assert [failure.id for failure in outcome.failed] == [102]
    assert [a["question_id"] for a in data.read_lines(tmp_path / "a.jsonl")] == [100, 101, 103]


def test_ids_that_repeat_are_kept_apart(tmp_path):
    """MME asks two questions about each picture, under the picture's id."""
    records = data.questions(tmp_path, 4)
    for record in records:
        record["question_id"] = f"scenes/{int(record['question_id']) // 2}.png"
    data.write_lines(tmp_path / "q.jsonl", records)
    ask(tmp_path, tmp_path / "a.jsonl")
    given = data.read_lines(tmp_path / "a.jsonl")
    assert [a["question_id"] for a in given] == [record["question_id"] for record in records]
    assert [a["prompt"] for a in given] == [record["text"] for record in records]
    assert len({a["answer_id"] for a in given}) == 4


def test_questions_without_a_picture_are_asked_beside_others(tmp_path):
    records = data.questions(tmp_path, 3)
    turns = [[{"from": "human", "value": f"<image>\n{r['text']}"}] for r in records]
    items = [
        {"id": str(n), "image": f"{n}.png", "conversations": turn} for n, turn in enumerate(turns)
    ]
    del items[1]["image"]
    (tmp_path / "sqa.json").write_text(json.dumps(items))
    outcome = ask(tmp_path, tmp_path / "a.jsonl", questions=tmp_path / "sqa.json", batch_size=3)
    assert outcome.failed == []
    given = data.read_lines(tmp_path / "a.jsonl")
    assert [a["metadata"]["visual_tokens"] for a in given] == [144, 0, 144]
    model, processor = tiny.load()
    text = f"{processor.tokenizer.bos_token}<|user|> {records[1]['text']}<|assistant|>"
    inputs = processor(text=text, return_tensors="pt", add_special_tokens=False)
    ids = model.generate(**inputs, max_new_tokens=16, do_sample=False)
    new = ids[0, inputs["input_ids"].shape[1] :]
    assert given[1]["text"] == processor.decode(new, skip_special_tokens=True).strip()


def test_pictures_of_two_batches_are_in_memory_at_most(eight, tmp_path, monkeypatch):
    alive, most = weakref.WeakSet(), 0
    original = asking.picture

    class Kept(Image.Image):
        """Can be referred to weakly and told apart."""

        __hash__ = object.__hash__

    def counted(*arguments):
        nonlocal most
        image = original(*arguments)
        image.__class__ = Kept
        alive.add(image)
        gc.collect()
        most = max(most, len(alive))
        return image

    monkeypatch.setattr(asking, "picture", counted)
    gc.freeze()  # to look through what other tests hold takes seconds
    try:
        ask(eight, tmp_path / "a.jsonl", batch_size=1)
    finally:
        gc.unfreeze()
    assert 1 <= most <= 3


def test_too_little_memory_says_the_way_out(eight, tmp_path, monkeypatch):
    def full(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(asking, "generate", full)
    with pytest.raises(ValueError, match="smaller batch size goes on from here"):
        ask(eight, tmp_path / "a.jsonl")


def test_a_model_that_cannot_be_pruned_ends_the_run(eight, tmp_path, monkeypatch):
    class Never(AutoPrune):
        def __call__(self, *arguments, **options):
            raise UnsupportedError("cannot be pruned")

    with pytest.raises(UnsupportedError):
        ask(eight, tmp_path / "a.jsonl", method=Never(16))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"limit": 0}, "limit must be at least 1, got 0"),
        ({"num_chunks": 2, "chunk_idx": 2}, "from 0 to num_chunks - 1, which is 1; got 2"),
    ],
)
def test_numbers_out_of_range_are_refused(eight, tmp_path, changes, said):
    with pytest.raises(ValueError, match=said):
        ask(eight, tmp_path / "a.jsonl", **changes)


def test_a_file_without_questions_is_refused(tmp_path, call):
    (tmp_path / "q.jsonl").write_text("\n\n")
    (tmp_path / "images").mkdir()
    code, _, err = call(*data.words(tmp_path, tmp_path / "a.jsonl"))
    assert code == 2 and "there are no questions in" in err
