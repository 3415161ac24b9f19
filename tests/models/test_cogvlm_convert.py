"""The published checkpoint of CogVLM becomes one of transformers', tensor by tensor."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from autoprune.loading import load_model
from autoprune.models.cogvlm import CogVLMForConditionalGeneration
from autoprune.models.cogvlm.__main__ import main
from autoprune.models.cogvlm.convert import convert
from autoprune.models.cogvlm.processing import TEMPLATES
from tests.models import cogvlm_checkpoint as published
from tests.models.cogvlm_by_hand import ByHand

INV_FREQ = "model.layers.0.self_attn.rotary_emb.inv_freq"


@pytest.fixture
def words(tmp_path: Path) -> str:
    published.tokenizer().save_pretrained(tmp_path / "words")
    return str(tmp_path / "words")


@pytest.mark.parametrize("files", [1, 3])
def test_a_converted_checkpoint_computes_what_the_published_tensors_do(tmp_path, words, files):
    tensors = published.tensors()
    extra = tensors | {INV_FREQ: torch.ones(8)}
    folder = published.write(tmp_path / "published", extra, files)
    convert(folder, tmp_path / "converted", words)

    loaded = load_model(str(tmp_path / "converted"), "cpu")
    assert isinstance(loaded.model, CogVLMForConditionalGeneration)
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randn(3, published.SIDE, published.SIDE, generator=generator)
    expected = ByHand(tensors, published.SIZES).logits([1, "picture", 8, 10, 11], pixels)
    first = published.VOCABULARY
    shown = [first + 1, *[first] * published.PATCHES, first + 2]
    with torch.no_grad():
        actual = loaded.model(
            input_ids=torch.tensor([[1, *shown, 8, 10, 11]]), pixel_values=pixels[None]
        ).logits[0]
    torch.testing.assert_close(actual, expected, atol=1e-3, rtol=0)
    assert expected.std() > 1
    assert loaded.model.generation_config.eos_token_id == 2
    assert loaded.processor.chat_template == TEMPLATES["chat"]
    assert loaded.processor.image_token_id == first
    assert loaded.model.dtype == torch.float32


def test_every_file_is_written_by_itself_and_the_index_names_it(tmp_path, words):
    folder = published.write(tmp_path / "published", published.tensors(), 3)
    convert(folder, tmp_path / "converted", words)
    index = json.loads((tmp_path / "converted" / "model.safetensors.index.json").read_text())
    by_file: dict[str, set[str]] = {}
    for name, file in index["weight_map"].items():
        by_file.setdefault(file, set()).add(name)
    assert len(by_file) == 3
    for file, names in by_file.items():
        with safe_open(tmp_path / "converted" / file, "pt") as stored:
            assert set(stored.keys()) == names
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in published.tensors().values())


def refused(folder: Path, output: Path, words: str, *parts: str) -> None:
    with pytest.raises(ValueError, match=re.escape(parts[0])) as caught:
        convert(folder, output, words)
    for part in parts[1:]:
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (output / "config.json").exists()


def test_a_missing_a_foreign_and_a_misshapen_tensor_are_named(tmp_path, words):
    tensors, output = published.tensors(), tmp_path / "converted"
    lost = "model.layers.1.mlp.vision_mlp.up_proj.weight"
    lacking = {name: tensor for name, tensor in tensors.items() if name != lost}
    refused(published.write(tmp_path / "a", lacking), output, words, "lacks", lost)
    foreign = tensors | {"model.cross_vision.boi": torch.zeros(1)}
    refused(published.write(tmp_path / "b", foreign), output, words, "has not: model.cross_vision")
    misshapen = tensors | {"model.norm.weight": torch.ones(3)}
    refused(
        published.write(tmp_path / "c", misshapen),
        output,
        words,
        "model.norm.weight",
        "[3]",
        "[64]",
    )


def test_folders_configurations_and_tokenizers_that_do_not_fit_are_refused(tmp_path, words):
    output = tmp_path / "converted"
    refused(tmp_path / "nowhere", output, words, "no config.json", "hf download")
    folder = published.write(tmp_path / "published", published.tensors())
    full = tmp_path / "full"
    full.mkdir()
    (full / "notes").touch()
    refused(folder, full, words, "is there already")
    refused(folder, output, str(tmp_path / "none"), "cannot load the tokenizer")
    larger = published.tokenizer()
    larger.add_tokens(["more"])
    larger.save_pretrained(tmp_path / "larger")
    refused(folder, output, str(tmp_path / "larger"), "141 tokens", "140", "vicuna")
    (folder / "model-00002-of-00002.safetensors").unlink()
    refused(folder, output, words, "lacks model-00002-of-00002.safetensors")
    for changed, part in (
        (published.CONFIG | {"num_multi_query_heads": 8}, "CogVLM2 is another model"),
        ({k: v for k, v in published.CONFIG.items() if k != "hidden_size"}, "lacks hidden_size"),
        (published.CONFIG | {"template_version": "old"}, "template must be one of chat, vqa, base"),
    ):
        (folder / "config.json").write_text(json.dumps(changed))
        refused(folder, output, words, part)


INDEX = "model.safetensors.index.json"


@pytest.mark.parametrize(
    ("name", "change", "part"),
    [
        ("model-00003-of-00003.safetensors", lambda b: b[:-1000], "download it once more"),
        ("model-00002-of-00003.safetensors", lambda b: b[:3], "download it once more"),
        (INDEX, lambda b: b"{", "cannot be read"),
        (INDEX, lambda b: b"{}", "is no index of files"),
        ("config.json", lambda b: b"{", "cannot be read"),
        ("config.json", lambda b: b"[1]", "holds no object"),
        ("config.json", lambda b: b.replace(b"64", b'"x"'), "is not that of CogVLM-17B"),
        ("config.json", lambda b: b.replace(b"96", b"-4"), "fit no CogVLM"),
    ],
)
def test_files_that_are_cut_off_or_damaged_are_refused_in_one_line(
    tmp_path, words, name, change, part
):
    folder = published.write(tmp_path / "published", published.tensors(), 3)
    (folder / name).write_bytes(change((folder / name).read_bytes()))
    refused(folder, tmp_path / "converted", words, part)


def test_the_command_converts_and_says_in_a_sentence_what_it_cannot(
    tmp_path, words, monkeypatch, capsys
):
    folder = published.write(tmp_path / "published", published.tensors())
    command = ["cogvlm", str(folder), str(tmp_path / "out"), "--tokenizer", words]
    monkeypatch.setattr(sys, "argv", [*command, "--template", "vqa"])
    main()
    assert load_model(str(tmp_path / "out"), "cpu").processor.chat_template == TEMPLATES["vqa"]
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 1
    assert capsys.readouterr().err.startswith("error: ")


def test_the_published_checkpoint_itself_is_refused_with_the_way_out(tmp_path):
    folder = published.write(tmp_path / "cogvlm-chat-hf", published.tensors())
    with pytest.raises(
        ValueError, match=r"convert it once by `python -m autoprune\.models\.cogvlm"
    ):
        load_model(str(folder), "cpu")
