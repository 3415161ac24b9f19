"""`autoprune drive` reads a plan from six pictures, and says what it kept of each."""

from __future__ import annotations

import pytest
from PIL import Image

from autoprune.commands import drive as command
from autoprune.commands.answers import Answer
from autoprune.models.senna import CAMERAS
from autoprune.models.senna.convert import convert
from tests.models import senna_checkpoint as tiny

TOKENS = 6 * tiny.VIEW_TOKENS


@pytest.fixture(scope="module")
def senna(tmp_path_factory):
    folder = tmp_path_factory.mktemp("senna")
    tiny.write_checkpoint(folder / "upstream")
    convert(folder / "upstream", folder / "model")
    return folder / "model"


@pytest.fixture
def frames(tmp_path):
    """As nuScenes names its files; a further one is none of a camera's."""
    folder = tmp_path / "frames"
    folder.mkdir()
    for camera, view in zip(CAMERAS, tiny.views(), strict=True):
        view.save(folder / f"n015-2018__{camera}__1533.png")
    (folder / "notes.txt").write_text("CAM_FRONT")
    return folder


@pytest.fixture
def drive(call, frames, senna):
    def run(*words, where=None):
        given = where or [frames]
        fixed = ("--speed", 4.2, "--model", senna, "--max-new-tokens", 3)
        return call("drive", *given, *fixed, "--budget", 12, "--dtype", "float32", *words)

    return run


def test_a_folder_is_read_in_the_order_of_training(drive, frames):
    record = drive("--json").record
    names = [f"n015-2018__{camera}__1533.png" for camera in CAMERAS]
    assert [view["image"] for view in record["views"]] == [str(frames / name) for name in names]
    assert "4 m/s, the navigation command is 'go straight'" in record["question"]
    assert record["num_visual"] == TOKENS
    assert sum(record["tokens_per_layer"]) == 12 * tiny.TEXT.num_hidden_layers
    for layer, number in enumerate(record["tokens_per_layer"]):
        assert sum(view["kept"][layer] for view in record["views"]) == number
    same = drive("--json", where=[view["image"] for view in record["views"]]).record
    assert same["kept"] == record["kept"]


def test_quotas_of_views_are_an_option(drive):
    record = drive("--set", "per_picture=equal", "--json").record
    for layer, number in enumerate(record["tokens_per_layer"]):
        kept = [view["kept"][layer] for view in record["views"]]
        assert sum(kept) == number and max(kept) - min(kept) <= 1
    shares = drive("--set", "per_picture=5 1 1 1 1 1", "--json").record
    assert shares["views"][0]["kept"][2] > max(view["kept"][2] for view in shares["views"][1:])
    refused = drive("--set", "per_picture=2 1")
    assert refused.code == 2
    assert "gives 2 shares, but prompt 0 of the batch has 6 pictures" in refused.err


def test_the_table_shows_plan_views_and_savings(drive, monkeypatch):
    plain = drive("--compare").out
    assert "plan: none" in plain and "unpruned" in plain and "saved" in plain
    assert all(camera in plain for camera in CAMERAS)

    def answers(*given):
        result, sample = original(*given)
        return Answer("STOP, LEFT_TURN", result.first_token_seconds, result.seconds), sample

    original = command.answer_pruned
    monkeypatch.setattr(command, "answer_pruned", answers)
    assert drive().out.startswith("plan: speed STOP, path LEFT_TURN\n")
    assert drive("--json").record["plan"] == {"speed": "STOP", "path": "LEFT_TURN"}


def test_the_picture_shows_the_views_with_their_counts(drive, tmp_path):
    path = tmp_path / "views.png"
    assert drive("--picture", path, "--json").record["picture"] == str(path)
    with Image.open(path) as image:
        assert image.width > 800 and image.height > 600


def test_without_a_model_it_says_where_to_get_one(call, frames):
    outcome = call("drive", frames, "--speed", 3)
    assert outcome.code == 2
    assert "get rb93dett/Senna" in outcome.err and outcome.err.count("\n") == 1


def test_another_model_is_refused(call, frames, model_folder):
    outcome = call("drive", frames, "--speed", 3, "--model", model_folder)
    assert outcome.code == 2
    assert "is a 'llava' model; drive needs a checkpoint of Senna" in outcome.err


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda f: (f / "n015-2018__CAM_BACK__1533.png").unlink(), "holds 0 pictures of CAM_BACK,"),
        (lambda f: tiny.views()[0].save(f / "cam_front.png"), "holds 2 pictures of CAM_FRONT,"),
    ],
)
def test_a_folder_without_one_picture_of_each_camera_is_refused(drive, frames, change, said):
    change(frames)
    outcome = drive()
    assert outcome.code == 2
    assert said in outcome.err and outcome.err.count("\n") == 1


def test_other_frames_speeds_and_commands_are_refused(call, frames, senna):
    for words, said in (
        (["a.png", "b.png", "--speed", 3], "got 2 paths"),
        (["none", "--speed", 3], "got 'none'"),
        ([frames, "--speed=-1"], "the speed must be a number of m/s, 0 or more"),
        ([frames, "--speed", 3, "--command", "fly"], "must be one of go straight"),
    ):
        outcome = call("drive", *words, "--model", senna)
        assert outcome.code == 2
        assert said in outcome.err and outcome.err.count("\n") == 1
