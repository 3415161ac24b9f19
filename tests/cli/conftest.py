"""A small model with random weights, a picture, and a way to call the command line."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from autoprune import cli, tiny
from autoprune.bench import policy
from autoprune.evaluation import timing
from autoprune.tiny.recipe.architecture import build_model
from autoprune.tiny.recipe.chat import make_processor

LAYERS = 6
VISUAL = 144


@dataclass(frozen=True)
class Outcome:
    code: int
    out: str
    err: str

    @property
    def record(self) -> Any:
        return json.loads(self.out)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of the embedded model's architecture, with fewer layers and random weights."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("model")
    processor = make_processor()
    build_model(processor.tokenizer, layers=LAYERS, vision_layers=2).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def few_timings(monkeypatch: pytest.MonkeyPatch) -> None:
    """`bench` times its planning 20 times, not a thousand, and `compare` two batches, not twelve."""
    monkeypatch.setattr(timing, "BATCHES", 2)
    monkeypatch.setattr(policy, "REPEATS", 20)
    monkeypatch.setattr(policy, "BLOCKS", 1)


@pytest.fixture(scope="session")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("picture") / "scene.png"
    tiny.draw_scene(3).image.save(path)
    return path


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """`call("run", path, ...)` as the shell would, without a process of its own."""

    def run(*words: object) -> Outcome:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            cli.main([str(word) for word in words])
        captured = capsys.readouterr()
        return Outcome(int(stop.value.code or 0), captured.out, captured.err)

    return run


@pytest.fixture
def ask(call: Callable[..., Outcome], picture: Path, model_folder: Path) -> Callable[..., Outcome]:
    """`autoprune run` on the picture and the small model; a budget of 30 unless told."""

    def run(*words: object, question: str = "is there a red ring?") -> Outcome:
        budget = () if {"--budget", "--target-token-num"} & set(words) else ("--budget", 30)
        fixed = ("--model", model_folder, "--max-new-tokens", 2)
        return call("run", picture, question, *fixed, *budget, *words)

    return run
