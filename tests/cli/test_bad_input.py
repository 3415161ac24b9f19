"""Whatever is wrong: one line on stderr that names it, exit code 2, nothing half-written."""

from __future__ import annotations

import json
import re

import pytest
from PIL import Image
from transformers import GPT2Config

from autoprune import Budget
from autoprune.commands import bench, compare, demo
from autoprune.commands import run as run_command
from autoprune.commands.inputs import build_method, parse_budget
from autoprune.commands.plan import in_convention


def assert_one_line(outcome, *words):
    assert outcome.code == 2
    assert outcome.out == ""
    assert outcome.err.startswith("autoprune: ")
    assert outcome.err.count("\n") == 1
    for word in words:
        assert word in outcome.err


@pytest.fixture
def files(tmp_path, picture):
    """Images that cannot be used, by name."""
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "empty.png").touch()
    (tmp_path / "cut.png").write_bytes(picture.read_bytes()[:2000])
    with Image.open(picture) as image:
        image.resize((400, 400)).save(tmp_path / "whole.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "whole.jpg").read_bytes()[:3000])
    Image.new("RGB", (2001, 10)).save(tmp_path / "thread.png")
    return tmp_path


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("missing.png", "there is no image file"),
        ("folder.png", "is a folder"),
        ("text.png", "is not an image"),
        ("empty.png", "is not an image"),
        ("cut.png", "damaged or truncated"),
        ("cut.jpg", "damaged or truncated"),
        ("thread.png", "2001 x 10 pixels"),
    ],
)
def test_an_image_that_cannot_be_used(call, files, model_folder, name, words):
    outcome = call("run", files / name, "what is this?", "--model", model_folder)
    assert_one_line(outcome, name, words)


@pytest.mark.parametrize("limit", [96 * 96 - 1, 96 * 96 // 2 - 1])
def test_an_oversized_image_is_not_decoded(ask, monkeypatch, limit):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    assert_one_line(ask(), "too large", "resize it first")


@pytest.mark.parametrize(
    "budget", ["0", "-5", "nan", "inf", "many", "1/0", "1/2/3", "0%", "120%", "9/4", ""]
)
def test_a_budget_that_is_none(ask, budget):
    assert_one_line(ask("--budget", budget), f"budget {budget!r}", "expected a number of tokens")


def test_a_budget_that_cannot_pay_for_layer_0_names_the_way_out(ask):
    refused = ask("--budget", 8)
    assert_one_line(refused, "smallest feasible budget", "give --set first_cut=pre_llm")
    # In words that the command line takes.
    assert "Budget." not in refused.err
    smallest = re.search(r"budget here is --budget ([\d.]+);", refused.err)[1]
    assert ask("--budget", smallest).code == 0
    assert ask("--budget", 8, "--set", "first_cut=pre_llm").code == 0


def test_a_share_that_is_too_small_names_one_that_is_not(ask):
    refused = ask("--budget", "1/144")
    smallest = re.search(r"budget here is --budget ([\d.]+%);", refused.err)[1]
    assert ask("--budget", smallest).code == 0


def test_a_number_of_tokens_that_was_meant_as_a_share(ask):
    refused = ask("--budget", 0.5)
    assert_one_line(refused, "smallest feasible budget here is --budget", "write --budget 50% if")
    assert refused.err.startswith("autoprune: the smallest feasible budget")
    assert ask("--budget", "50%").code == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--method", "autoprun"), "did you mean 'autoprune'"),
        (("--set", "depth=3"), "has no option 'depth'"),
        (("--set", "mi_layer"), "not of the form name=value"),
        (("--set", "budget=3"), "give it as --budget 3"),
        (("--set", "name=x"), "autoprune has no option 'name'; it has k0, "),
        (("--set", "mi_layer=high"), "mi_layer expects a number"),
        (("--method", "autoprune_reference", "--set", "recycle=perhaps"), "expects true or false"),
        (("--set", "curve=zigzag"), "unknown curve 'zigzag'"),
        (("--set", "mi_layer=40"), "mi_layer is 40"),
        (("--x0", "nan"), "x0 must be a finite number"),
        (("--device", "abacus"), "device 'abacus' is not available"),
        (("--device", "meta"), "device 'meta' is not available"),
        (("--dtype", "int3"), "dtype must be one of"),
    ],
)
def test_an_option_that_does_not_fit(ask, words, message):
    assert_one_line(ask(*words), message)


def test_an_empty_question(ask):
    assert_one_line(ask(question="  "), "the question is empty")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere", "there is no model folder"),
        ("/no/where", "there is no model folder"),
        ("some-body/some-model", "HF_HUB_OFFLINE is set, so it is not downloaded"),
    ],
)
def test_a_model_that_does_not_exist(call, picture, name, message):
    assert_one_line(call("run", picture, "what is this?", "--model", name), message)


def test_a_file_is_not_a_model(call, picture):
    assert_one_line(call("run", picture, "what is this?", "--model", picture), "is a file")


def test_a_folder_without_a_model(call, picture, tmp_path):
    assert_one_line(call("run", picture, "what is this?", "--model", tmp_path), "no config.json")


def test_a_language_model_takes_no_images(call, picture, tmp_path):
    GPT2Config(n_layer=1).save_pretrained(tmp_path)
    outcome = call("run", picture, "what is this?", "--model", tmp_path)
    assert_one_line(outcome, "'gpt2' model, which takes no images")


def test_a_damaged_config(call, picture, tmp_path):
    (tmp_path / "config.json").write_text("{")
    assert_one_line(
        call("run", picture, "what is this?", "--model", tmp_path), "cannot read the model"
    )


def test_damaged_weights(call, picture, tmp_path, model_folder):
    for path in model_folder.iterdir():
        (tmp_path / path.name).write_bytes(
            path.read_bytes()[: 5000 if path.suffix == ".safetensors" else None]
        )
    assert_one_line(
        call("run", picture, "what is this?", "--model", tmp_path), "cannot load the model"
    )


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no/kept.png", "there is no folder"),
        ("kept.jpg", "PNG"),
        (".", "PNG"),
        ("dir.png", "is a folder"),
    ],
)
def test_a_picture_that_cannot_be_written_is_refused_before_the_model_runs(
    ask, tmp_path, monkeypatch, name, message
):
    (tmp_path / "dir.png").mkdir()
    monkeypatch.setattr(run_command, "load_model", None)
    assert_one_line(ask("--picture", tmp_path / name), message)


@pytest.mark.parametrize(
    "words",
    [
        ("demo", "--output", "/proc/new"),
        ("demo", "--output", "/proc/new/er"),
        ("bench", "--quick", "--output", "/proc/new"),
        ("bench", "--quick", "--output", "/proc/new.json"),
        ("plan", "--output", "/proc/new.png"),
        ("compare", "--quick", "--output", "/proc/new"),
        ("compare", "--quick", "--output", "x" * 300),
    ],
    ids=lambda words: f"{words[0]} {words[-1][:15]}",
)
def test_an_output_that_cannot_be_written_is_refused_before_the_work(call, monkeypatch, words):
    def work(*_, **__):
        raise AssertionError("the work has begun")

    for module in (bench, compare, demo):
        for name in ("load_embedded", "load_model", "_subject", "_tasks", "_compare"):
            monkeypatch.setattr(module, name, work, raising=False)
    outcome = call(*words)
    assert_one_line(outcome, f"cannot write {words[-1]!r} (", "choose another place")


def test_a_folder_in_the_place_of_the_picture(call, tmp_path):
    (tmp_path / "kept_patches.png").mkdir()
    assert_one_line(call("demo", "--output", tmp_path), "kept_patches.png' is a folder")


def test_a_url_is_named_whole(call):
    outcome = call("run", "https://example.com/a.png", "what is this?")
    assert_one_line(outcome, "'https://example.com/a.png' is a URL, and URLs are not fetched")


def test_a_failure_while_the_model_runs_leaves_no_file(ask, tmp_path, monkeypatch):
    def fail(*_):
        raise RuntimeError("out of luck")

    monkeypatch.setattr(run_command, "answer_pruned", fail)
    assert_one_line(
        ask("--picture", tmp_path / "kept.png"), "unexpected RuntimeError: out of luck", "--debug"
    )
    assert list(tmp_path.iterdir()) == []


def test_debug_shows_where_an_error_arose(ask, monkeypatch, capsys):
    def fail(*_):
        raise RuntimeError("out of luck")

    monkeypatch.setattr(run_command, "answer_pruned", fail)
    with pytest.raises(RuntimeError, match="out of luck"):
        ask("--debug")


@pytest.mark.parametrize(
    "words", [("run",), ("run", "a.png"), ("nothing",), ("plan", "--layers", "many")]
)
def test_a_command_that_is_not_understood_exits_with_2(call, words):
    outcome = call(*words)
    assert outcome.code == 2
    assert "Usage" in outcome.err


@pytest.mark.parametrize(
    ("budget", "said"),
    [
        ("16 over stream", "a stream is kept by a Fleet, in Python"),
        ("16 over night", "expected a number of tokens"),
        ("over batch", "expected a number of tokens"),
        ("1.5x over batch", "expected a number of tokens"),
    ],
)
def test_budgets_over_what_is_none_are_refused(budget, said):
    with pytest.raises(ValueError, match=said):
        parse_budget(budget)


def test_a_budget_over_a_batch_is_for_methods_that_share_it():
    assert parse_budget("1/9 over batch") == Budget.ratio(1 / 9, over="batch")
    shared = parse_budget("16 over batch")
    assert build_method("autoprune", shared, {}, []).budget == Budget.tokens(16, over="batch")
    for name in ("fastv", "autoprune_reference"):
        with pytest.raises(ValueError, match=f"{name} gives every prompt the same budget"):
            build_method(name, shared, {}, [])
    with pytest.raises(
        ValueError, match=r"converts a number of tokens, got .* mean over the batch"
    ):
        in_convention("fastv", shared, 576, 32)


@pytest.mark.parametrize("kind", ["llava", "llava_llama"])
def test_a_checkpoint_of_llavas_own_code_is_told_from_others(call, picture, tmp_path, kind):
    config = {"model_type": kind, "mm_vision_tower": "openai/clip-vit-large-patch14-336"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    outcome = call("run", picture, "what?", "--model", tmp_path)
    assert outcome.code == 2 and "in the format of LLaVA's own code" in outcome.err
    assert "llava-hf/llava-1.5-7b-hf" in outcome.err
