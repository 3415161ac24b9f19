"""Several processes, as torchrun and accelerate start them, write one file."""

from __future__ import annotations

import json
import socket
import sys

import pytest

from autoprune.evaluation.files.processes import Processes
from tests.files import data


def free_port():
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        return str(bound.getsockname()[1])


TORCHRUN = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port"]
ACCELERATE = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
ACCELERATE += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
ACCELERATE += ["--main_process_port"]
TOLD = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def test_two_processes_share_the_questions(eight, tmp_path, call):
    assert call(*data.words(eight, tmp_path / "one.jsonl", "--batch-size", 2))[0] == 0
    path = tmp_path / "two.jsonl"
    command = data.words(eight, path, "--batch-size", 2)
    process = data.shell(*command, python=[*TORCHRUN, free_port(), "-m", "autoprune"])
    _, err = process.communicate()
    assert process.returncode == 0, err
    assert path.read_bytes() == (tmp_path / "one.jsonl").read_bytes()
    shares = []
    for rank in (0, 1):
        lines = data.read_lines(tmp_path / f"two.jsonl.run/answers-{rank}.jsonl")
        shares.append([[position for position, _ in line["answers"]] for line in lines])
    assert shares == [[[0, 1], [4, 5]], [[2, 3], [6, 7]]]


def test_accelerate_tells_its_processes_what_torchrun_does(tmp_path, monkeypatch):
    script, port = tmp_path / "tell.py", free_port()
    script.write_text(
        "import json, os, pathlib\n"
        f"told = {{name: os.environ[name] for name in {TOLD}}}\n"
        f"pathlib.Path({str(tmp_path)!r}, told['RANK']).write_text(json.dumps(told))\n"
    )
    process = data.shell(str(script), python=[*ACCELERATE, port])
    _, err = process.communicate()
    assert process.returncode == 0, err
    for rank in (0, 1):
        told = json.loads((tmp_path / str(rank)).read_text())
        assert told["MASTER_PORT"] == port and told["MASTER_ADDR"]
        for name, value in told.items():
            monkeypatch.setenv(name, value)
        assert Processes.launched() == Processes(rank, 2, rank)


def test_one_process_goes_on_where_two_were_killed(eight, tmp_path, call):
    path, folder = tmp_path / "a.jsonl", tmp_path / "a.jsonl.run"
    command = data.words(eight, path, "--batch-size", 1)
    assert call(*command)[0] == 0
    whole = path.read_bytes()
    lines = (folder / "answers-0.jsonl").read_text().splitlines(keepends=True)
    (folder / "answers-0.jsonl").write_text("".join(lines[0:3:2]))
    (folder / "answers-1.jsonl").write_text(lines[3] + lines[1][:40])
    path.unlink()
    assert call(*command)[0] == 0
    assert path.read_bytes() == whole
    after = [json.loads(line) for line in (folder / "answers-0.jsonl").read_text().splitlines()]
    assert [a["answers"][0][0] for a in after] == [0, 2, 1, 4, 5, 6, 7]


@pytest.mark.parametrize(
    ("environment", "found"),
    [
        ({}, Processes()),
        ({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}, Processes()),
        ({"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}, Processes(5, 8, 1)),
    ],
)
def test_a_process_knows_its_share(monkeypatch, environment, found):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert Processes.launched() == found


def test_each_process_takes_a_gpu_of_its_own(monkeypatch):
    torch = sys.modules["torch"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert [Processes(rank, 8, rank % 4).device("auto") for rank in (0, 3, 6)] == [
        "cuda:0",
        "cuda:3",
        "cuda:2",
    ]
    assert Processes(3, 8, 3).device("cpu") == "cpu"
    assert Processes().device("auto") == "auto"
