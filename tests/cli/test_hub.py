"""A hub name at --model is what `from_pretrained` takes; what the hub refuses is one sentence."""

from __future__ import annotations

import huggingface_hub
import pytest
import transformers
from huggingface_hub import constants, errors
from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars

from autoprune.loading import load_model, show_downloads, why_not_from_hub
from tests.cli.test_bad_input import assert_one_line

NAME = "some-body/some-model"


def of(kind):
    """An error of the hub without the answer it came with."""
    error = kind.__new__(kind)
    Exception.__init__(error, "403 Forbidden\n\nlong explanations")
    return error


def wrapped(error, around=OSError):
    """As transformers hands it on."""
    outer = around("a sentence of transformers")
    outer.__cause__ = error
    return outer


@pytest.fixture
def online(monkeypatch):
    monkeypatch.setattr(huggingface_hub, "is_offline_mode", lambda: False)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (of(errors.GatedRepoError), f"gated: accept its terms at https://huggingface.co/{NAME}"),
        (of(errors.RepositoryNotFoundError), "no model of that name or it is private"),
        (of(errors.LocalEntryNotFoundError), "the Hugging Face hub cannot be reached"),
        (ConnectionError("reset"), "the Hugging Face hub cannot be reached"),
        (of(errors.HfHubHTTPError), f"refused to hand out {NAME!r}: 403 Forbidden"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_refusal_of_the_hub_is_one_sentence(call, picture, monkeypatch, online, error, message):
    def refuse(*_, **__):
        raise wrapped(error)

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", refuse)
    outcome = call("run", picture, "what is this?", "--model", NAME)
    assert_one_line(outcome, message, NAME)
    assert "long explanations" not in outcome.err


def test_weights_that_cannot_be_had_are_a_refusal_of_the_hub_too(
    call, picture, monkeypatch, online, model_folder
):
    config = transformers.AutoConfig.from_pretrained(model_folder)
    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", lambda *_, **__: config)

    def refuse(*_, **__):
        raise wrapped(of(errors.GatedRepoError))

    monkeypatch.setattr(transformers.AutoProcessor, "from_pretrained", lambda *_, **__: None)
    monkeypatch.setattr(transformers.AutoModelForImageTextToText, "from_pretrained", refuse)
    assert_one_line(call("run", picture, "what is this?", "--model", NAME), "is gated")


def test_what_is_not_the_hubs_fault_is_told_as_it_is():
    assert why_not_from_hub(NAME, ValueError("the config is damaged")) is None
    assert why_not_from_hub(NAME, wrapped(of(errors.EntryNotFoundError))) is None


def test_code_of_a_models_own_is_not_run_and_not_asked_about(call, picture, monkeypatch):
    def refuse(*_, trust_remote_code=None, **__):
        assert trust_remote_code is False
        raise ValueError("Please pass the argument `trust_remote_code=True` to allow custom code")

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", refuse)
    outcome = call("run", picture, "what is this?", "--model", NAME)
    assert_one_line(outcome, "brings code of its own, which is not run", "-hf")


def test_a_package_that_the_processor_lacks_is_named_before_the_weights_are_fetched(
    call, picture, monkeypatch, model_folder
):
    def refuse(*_, **__):
        raise ImportError("Qwen2VLVideoProcessor requires the Torchvision library but it was not")

    monkeypatch.setattr(transformers.AutoProcessor, "from_pretrained", refuse)
    monkeypatch.setattr(transformers.AutoModelForImageTextToText, "from_pretrained", None)
    outcome = call("run", picture, "what is this?", "--model", model_folder)
    assert_one_line(outcome, "needs torchvision: pip install torchvision")


def test_a_name_of_the_hub_is_downloaded_with_its_bar_and_a_folder_shows_none(
    monkeypatch, model_folder
):
    """`from_pretrained` stands in for the hub and hands out a folder."""
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_PROGRESS_BARS", None)
    asked = []

    def redirected(method):
        def load(name, *arguments, **options):
            asked.append((name, options.get("local_files_only"), are_progress_bars_disabled()))
            folder = model_folder if name == NAME else name
            return method(folder, *arguments, **options)

        return load

    for kind in ("AutoConfig", "AutoModelForImageTextToText", "AutoProcessor"):
        loader = getattr(transformers, kind)
        monkeypatch.setattr(loader, "from_pretrained", redirected(loader.from_pretrained))
    loaded = load_model(NAME)
    assert loaded.name == "some-model"
    assert asked.count((NAME, None, False)) == 3
    assert not any(local or hidden for _, local, hidden in asked)
    asked.clear()
    load_model(str(model_folder))
    assert all(hidden for _, _, hidden in asked)
    disable_progress_bars()


def test_the_users_switch_for_progress_bars_has_priority(monkeypatch, recwarn):
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_PROGRESS_BARS", True)
    show_downloads()
    assert not recwarn.list
