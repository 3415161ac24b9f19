"""The shell lines of the released scripts, with the module's name changed, and what reads their output."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import pytest
import typer
from PIL import Image

from autoprune import AutoPruneReference, cli, tiny
from tests.files import data

# scripts/v1_5/eval/gqa.sh of the release; what is changed: the module and the folders.
GQA_SH = r"""
gpu_list="${CUDA_VISIBLE_DEVICES:-0}"
IFS=',' read -ra GPULIST <<< "$gpu_list"

CHUNKS=${#GPULIST[@]}

CKPT="embedded"
METHOD="AdaPruner"
TOKEN=${1}
PARAM="n_${TOKEN}"

for IDX in $(seq 0 $((CHUNKS-1))); do
    CUDA_VISIBLE_DEVICES=${GPULIST[$IDX]} python -W ignore -m autoprune.llava_eval \
        --model-path ${CKPT} \
        --question-file ./q.jsonl \
        --image-folder ./images \
        --answers-file ./answers/${CKPT}/${METHOD}/${PARAM}/${CHUNKS}_${IDX}.jsonl \
        --num-chunks ${CHUNKS} \
        --chunk-idx ${IDX} \
        --visual-token-num 576 \
        --temperature 0 \
        --conv-mode vicuna_v1 \
        --x0 14.9 \
        --k0 0.4 \
        --gamma 0.2 \
        --target-token-num ${TOKEN} &
done

wait

output_file=./answers/${CKPT}/${METHOD}/${PARAM}/merge.jsonl

# Clear out the output file if it exists.
> "$output_file"

# Loop through the indices and concatenate each file.
for IDX in $(seq 0 $((CHUNKS-1))); do
    cat ./answers/${CKPT}/${METHOD}/${PARAM}/${CHUNKS}_${IDX}.jsonl >> "$output_file"
done
"""


def released(folder, answers, *more, asked="q.jsonl"):
    words = ["llava-eval", "--model-path", "embedded", "--question-file", folder / asked]
    words += ["--image-folder", folder / "images", "--answers-file", answers]
    return [*words, "--temperature", 0, "--conv-mode", "vicuna_v1", *more]


def reference(folder, target, **curve):
    """The answers of the released method, one by one."""
    model, processor = tiny.load()
    answers, means = [], []
    for question in data.read_lines(folder / "q.jsonl"):
        image = Image.open(folder / "images" / question["image"])
        with AutoPruneReference(target, **curve)(model) as trace:
            answers.append(tiny.answer(model, processor, image, question["text"], 128))
        means.append(trace.samples[0].mean_tokens)
    return answers, means


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_the_released_shell_line_runs(eight, tmp_path):
    for name in ("images", "q.jsonl"):
        (tmp_path / name).symlink_to(eight / name)
    path = f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}"
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "0,1", "PATH": path}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    done = subprocess.run(
        ["bash", "-e", "-c", GQA_SH, "gqa.sh", "16"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "vicuna_v1 is not how this model was trained" in done.stderr
    folder = tmp_path / "answers/embedded/AdaPruner/n_16"
    assert len(data.read_lines(folder / "2_0.jsonl")) == 4
    given = data.read_lines(folder / "merge.jsonl")
    texts, means = reference(eight, 16, x0=14.9, k0=0.4, gamma=0.2)
    assert [answer["text"] for answer in given] == texts
    assert [answer["metadata"]["mean_tokens"] for answer in given] == means
    assert {answer["metadata"]["method"] for answer in given} == {"autoprune_reference"}
    assert {answer["model_id"] for answer in given} == {"embedded"}


def test_the_curve_and_the_target_are_those_that_are_given(eight, tmp_path, call):
    curve = {"x0": 3.0, "k0": 2.5, "gamma": 0.0}
    flags = [word for name, value in curve.items() for word in (f"--{name}", value)]
    command = released(eight, tmp_path / "a.jsonl", "--target-token-num", 24, *flags)
    assert call(*command)[0] == 0
    given = data.read_lines(tmp_path / "a.jsonl")
    texts, means = reference(eight, 24, **curve)
    assert [answer["text"] for answer in given] == texts
    assert [answer["metadata"]["mean_tokens"] for answer in given] == means
    _, defaults = reference(eight, 24)
    assert means != defaults


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--temperature", 0.2), "--temperature must be 0, got 0.2"),
        (("--num_beams", 2), "--num_beams must be 1, got 2"),
        (("--model-base", "vicuna"), "--model-base is not understood: merge the adapter"),
        (("--conv-mode", "mpt"), "'mpt' is not known; use vicuna_v1"),
        (("--lang", "fr", "--single-pred-prompt"), "--lang must be one of en, cn, got 'fr'"),
    ],
)
def test_what_is_not_understood_is_refused(eight, tmp_path, call, flags, said):
    code, _, err = call(*released(eight, tmp_path / "a.jsonl", *flags))
    assert code == 2 and said in err
    assert not (tmp_path / "a.jsonl.run").exists()


def test_llavas_converters_read_the_answers(tmp_path, call):
    """What each of them does to the file, restated."""
    records = data.questions(tmp_path, 4)
    for record in records:
        record["question_id"] = f"color/{int(record['question_id']) // 2}.png"
    data.write_lines(tmp_path / "q.jsonl", records)
    assert call(*released(tmp_path, tmp_path / "a.jsonl", "--target-token-num", 16))[0] == 0
    lines = [json.loads(line) for line in (tmp_path / "a.jsonl").open()]

    # convert_gqa_for_eval.py
    gqa = [(line["question_id"], line["text"].rstrip(".").lower()) for line in lines]
    assert [name for name, _ in gqa] == [record["question_id"] for record in records]
    # convert_vqav2_for_submission.py
    by_id = {line["question_id"]: line["text"] for line in lines}
    assert set(by_id) == {record["question_id"] for record in records}
    # convert_answer_to_mme.py looks the truth up by category, file and question.
    truth = {("color", f"{50 + n // 2}.txt", record["text"]) for n, record in enumerate(records)}
    for line in lines:
        category = line["question_id"].split("/")[0]
        file = line["question_id"].split("/")[-1].split(".")[0] + ".txt"
        assert (category, file, line["prompt"]) in truth
    assert len(lines) == len(truth) == 4


def test_scienceqa_and_mmbench_are_answered_for_their_scripts(tmp_path, call):
    records = data.questions(tmp_path, 2)
    items = [
        {"id": str(n), "image": f"{n}.png", "conversations": [{"value": f"<image>\n{r['text']}"}]}
        for n, r in enumerate(records)
    ]
    del items[1]["image"]
    (tmp_path / "sqa.json").write_text(json.dumps(items))
    flags = ("--single-pred-prompt", "--max_new_tokens", 4)
    command = released(tmp_path, tmp_path / "s.jsonl", *flags, asked="sqa.json")
    assert call(*command)[0] == 0
    # eval_science_qa.py
    lines = {line["question_id"]: line for line in data.read_lines(tmp_path / "s.jsonl")}
    assert list(lines) == ["0", "1"]
    assert ["<image>" in lines[name]["prompt"] for name in "01"] == [True, False]
    assert all(isinstance(line["text"].replace("\n", ". "), str) for line in lines.values())

    code = data.in_base64(tmp_path / "images/0.png")
    rows = [["index", "question", "hint", "A", "B", "C", "D", "image"]]
    rows += [[str(n), "which?", "", "red", "blue", "", "", code] for n in (7, 1000007)]
    (tmp_path / "mm.tsv").write_text("\n".join("\t".join(row) for row in rows))
    flags = ("--single-pred-prompt", "--lang", "cn", "--max_new_tokens", 4)
    assert call(*released(tmp_path, tmp_path / "m.jsonl", *flags, asked="mm.tsv"))[0] == 0
    # convert_mmbench_for_submission.py compares the id with a column of numbers.
    lines = data.read_lines(tmp_path / "m.jsonl")
    assert [line["question_id"] for line in lines] == [7, 1000007]
    assert {line["prompt"] for line in lines} == {"which?\nA. red\nB. blue"}
    assert lines[0]["options"] == ["red", "blue"] and lines[0]["option_char"] == ["A", "B"]


def test_the_length_of_answers_is_llavas(tmp_path, call):
    data.questions(tmp_path, 1)
    (tmp_path / "sqa.json").write_text('[{"id": "1", "conversations": [{"value": "a"}]}]')
    for asked, tokens in (("q.jsonl", 128), ("sqa.json", 1024)):
        answers = tmp_path / f"{asked}.answers"
        assert call(*released(tmp_path, answers, asked=asked))[0] == 0
        config = json.loads((tmp_path / f"{asked}.answers.run/config.json").read_text())
        assert config["compared"]["max_new_tokens"] == tokens


FLAGS = """
--model-path --model-base --image-folder --question-file --answers-file --conv-mode --num-chunks --chunk-idx
--temperature --top_p --num_beams --max_new_tokens --visual-token-num --target-token-num --x0 --k0 --gamma
--seed --single-pred-prompt --lang
"""


def test_every_flag_of_the_scripts_is_known():
    command = typer.main.get_command(cli.app)
    known = {name for param in command.commands["llava-eval"].params for name in param.opts}
    assert set(FLAGS.split()) <= known
