"""A file of tuned settings builds the method again, on its model only, and is refused where it is damaged."""

from __future__ import annotations

import copy
import dataclasses
import json
from types import SimpleNamespace

import pytest
from transformers import AutoTokenizer

import autoprune
from autoprune import AutoPrune, Budget, tiny
from autoprune.methods.fastv import FastV
from autoprune.methods.sparsevlm import SparseVLM
from autoprune.methods.tuned_file import ModelIdentity, TunedFile, settings_of
from autoprune.tiny.recipe.architecture import build_model


@pytest.fixture(scope="module")
def model():
    return tiny.load()[0]


@pytest.fixture
def write(tmp_path, model):
    def written(method, /, **changes):
        file = TunedFile(
            method.name,
            method.budget,
            settings_of(method),
            ModelIdentity.of(model, "embedded model"),
            {"verdict": "better"},
            {"tuned_on": 400},
            "0.1.0",
        )
        path = tmp_path / "tuned.json"
        file.write(path)
        record = json.loads(path.read_text()) | changes
        path.write_text(json.dumps(record))
        return path

    return written


@pytest.mark.parametrize(
    "method",
    [
        AutoPrune(Budget.ratio(1 / 9), k0=0.123, merger="dpc_knn", cut_every="auto"),
        AutoPrune(Budget.tokens(16, "leaving")),
        FastV(Budget.flops(0.25), layer=3),
        SparseVLM(36),
    ],
)
def test_what_is_loaded_equals_what_was_written(write, method):
    path = write(method)
    assert autoprune.load_method(path) == method
    assert type(method).load(path) == method


def test_the_model_itself_is_found_in_the_file(write):
    record = json.loads(write(AutoPrune(16)).read_text())
    assert record["model"] == {
        **{"architecture": "llava", "layers": 16, "hidden_size": 128, "vocabulary": 437},
        "fingerprint": record["model"]["fingerprint"],
        "name": "embedded model",
    }
    assert Budget(**record["budget"]) == Budget.tokens(16)
    assert record["format_version"] == 1 and record["autoprune"] == "0.1.0"


def test_it_prunes_its_own_model_and_no_other(write, model):
    loaded = AutoPrune.load(write(AutoPrune(16)))
    loaded(model)
    tokenizer = AutoTokenizer.from_pretrained(tiny.path(), local_files_only=True)
    other = build_model(tokenizer, layers=6, vision_layers=2).eval()
    with pytest.raises(
        ValueError, match=r"tuned for 'embedded model', llava with 16 layers.*6 layers"
    ):
        loaded(other)
    with pytest.raises(ValueError, match="tuned for"):
        loaded.attach(other)
    dataclasses.replace(loaded, k0=0.5, budget=40)(other)


def test_a_model_of_the_same_depth_and_another_tower_is_another(model):
    config = copy.deepcopy(model.config)
    config.vision_config.num_hidden_layers += 1
    identity = ModelIdentity.of(model)
    other = ModelIdentity.of(SimpleNamespace(config=config))
    assert (other.layers, other.hidden_size) == (identity.layers, identity.hidden_size)
    assert other != identity
    # What a release of transformers adds, or the user's precision, changes nothing.
    config = copy.deepcopy(model.config)
    config.dtype, config.transformers_version, config.text_config.something_new = "bfloat16", "9", 1
    assert ModelIdentity.of(SimpleNamespace(config=config)) == identity


def test_the_wrong_class_says_what_the_file_holds(write):
    with pytest.raises(
        ValueError, match=r"holds the method fastv, and AutoPrune is autoprune; autoprune.load"
    ):
        AutoPrune.load(write(FastV(16)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "something"}, "holds no tuned settings"),
        ({"format_version": 2}, "has format 2 of autoprune 0.1.0, and this release reads 1"),
        ({"settings": []}, r"are damaged: settings is \[\]"),
        ({"model": {"layers": 3}}, "are damaged: .*missing"),
        ({"budget": {"kind": "tokens", "value": -1}}, "are damaged: .*above 0"),
        ({"settings": {"k0": -1.0}}, "k0 must be 0 or more"),
        ({"settings": {"strength": 1}}, "of autoprune 0.1.0, are none of this release's autoprune"),
        ({"method": "none_such"}, "there is no method 'none_such'"),
    ],
)
def test_a_wrong_file_is_refused_in_a_sentence(write, changes, message):
    with pytest.raises(ValueError, match=message):
        autoprune.load_method(write(AutoPrune(16), **changes))


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b'"text"'])
def test_a_file_that_is_none(tmp_path, content):
    path = tmp_path / "tuned.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"damaged|holds no tuned settings"):
        AutoPrune.load(path)
    with pytest.raises(ValueError, match="cannot read the tuned settings"):
        AutoPrune.load(tmp_path / "missing.json")
