"""Senna: conversion of its authors' checkpoints, its network and its prompt, and pruning it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch.nn import functional as F
from transformers import CLIPVisionModel, LlamaForCausalLM

from autoprune import AutoPrune, Budget, create
from autoprune.loading import load_model
from autoprune.models.senna import CAMERAS, LABELS, driving_messages
from autoprune.models.senna.__main__ import main
from autoprune.models.senna.convert import convert
from tests import oracle
from tests.models import senna_checkpoint as tiny

QUESTION = "What is your plan?"
# Of CLIP's mean colour, and CLIP's own numbers.
MEAN = np.array([0.48145466, 0.4578275, 0.40821073])
DEVIATION = np.array([0.26862954, 0.26130258, 0.27577711])


@pytest.fixture(scope="module")
def upstream(tmp_path_factory):
    folder = tmp_path_factory.mktemp("senna") / "upstream"
    return folder, tiny.write_checkpoint(folder)


@pytest.fixture(scope="module")
def loaded(upstream):
    folder, _ = upstream
    convert(folder, folder.parent / "converted")
    return load_model(str(folder.parent / "converted"), dtype="float32")


def inputs(loaded, pictures, question=QUESTION):
    return loaded.processor.apply_chat_template(
        driving_messages(pictures, question),
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )


def prompt(question: str) -> list[str]:
    """The pieces of text around the pictures, as the authors' code has them."""
    system = (
        "A chat between a curious human and an artificial intelligence assistant. The assistant gives "
        "helpful, detailed, and polite answers to the human's questions. USER: "
    )
    names = ["FRONT", "FRONT LEFT", "FRONT RIGHT", "BACK LEFT", "BACK RIGHT", "BACK"]
    text = system + "".join(f"<{name} VIEW>:\n<image>\n" for name in names) + question
    return f"{text} ASSISTANT:".split("<image>")


def pixels_of(picture: Image.Image) -> torch.Tensor:
    """Padded to a square in CLIP's mean colour, resized by Pillow, and normalised."""
    side = max(picture.size)
    square = Image.new("RGB", (side, side), tuple(int(x * 255) for x in MEAN))
    square.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
    values = np.asarray(square.resize((tiny.SIDE, tiny.SIDE), Image.Resampling.BICUBIC)) / 255
    normal = (values - MEAN) / DEVIATION
    return torch.from_numpy(normal.transpose(2, 0, 1)).float()


def slow_logits(weights, pictures) -> torch.Tensor:
    """The logits of every place, from the authors' weights, view by view."""
    head = "model.vision_tower.vision_tower.vision_model."
    tower, text = CLIPVisionModel(tiny.VISION).eval(), LlamaForCausalLM(tiny.TEXT).eval()
    prefix = (
        "vision_model." if "vision_model.embeddings.class_embedding" in tower.state_dict() else ""
    )
    own = {prefix + n.removeprefix(head): w for n, w in weights.items() if n.startswith(head)}
    tower.load_state_dict({n: w for n, w in own.items() if "position_ids" not in n})
    text.load_state_dict({n: weights[n] for n in text.state_dict()})

    def linear(name: str, x: torch.Tensor) -> torch.Tensor:
        return x @ weights[f"model.{name}.weight"].T + weights[f"model.{name}.bias"]

    tokenizer, rows = tiny.tokenizer(), []
    for number, piece in enumerate(prompt(QUESTION)):
        if number:
            pixels = pixels_of(pictures[number - 1])[None]
            states = tower(pixels, output_hidden_states=True).hidden_states
            x = linear("mm_projector.2", F.gelu(linear("mm_projector.0", states[-2][0, 1:])))
            # Along the patches, channel by channel.
            for layer in (0, 2, 4):
                w, b = (
                    weights[f"model.img_adapter.adapter.{layer}.{n}"] for n in ("weight", "bias")
                )
                x = torch.einsum("tp,pc->tc", w, x) + b[:, None]
                x = F.gelu(x) if layer < 4 else x
            rows.append(x)
        ids = [*([] if number else [1]), *tokenizer(piece)["input_ids"]]
        rows.append(weights["model.embed_tokens.weight"][ids])
    return text(inputs_embeds=torch.cat(rows)[None]).logits[0]


@torch.no_grad()
@pytest.mark.parametrize("as_bin", [True, False])
def test_a_converted_checkpoint_has_the_logits_of_the_authors_weights(tmp_path, as_bin):
    weights = tiny.write_checkpoint(tmp_path / "upstream", seed=3, as_bin=as_bin)
    convert(tmp_path / "upstream", tmp_path / "converted")
    loaded = load_model(str(tmp_path / "converted"), dtype="float32")
    pictures = tiny.views(3)
    given = inputs(loaded, pictures)
    assert loaded.model.config.model_type == "senna"
    actual = loaded.model(**given).logits[0]
    expected = slow_logits(weights, pictures)
    words = expected.shape[1]
    torch.testing.assert_close(actual[:, :words], expected, atol=2e-3, rtol=0)
    assert expected.std() > 1


def test_the_prompt_has_128_tokens_of_each_view_as_the_adapter_makes_them(loaded):
    given = inputs(loaded, tiny.views())
    image, ids = loaded.model.config.image_token_id, given["input_ids"][0]
    assert (ids == image).sum() == 6 * tiny.VIEW_TOKENS
    pieces = tiny.tokenizer()
    expected = [1, *pieces(prompt(QUESTION)[0])["input_ids"]]
    for piece in prompt(QUESTION)[1:]:
        expected += [image] * tiny.VIEW_TOKENS
        expected += pieces(piece)["input_ids"]
    assert ids.tolist() == expected
    assert given["pixel_values"].shape == (6, 3, tiny.SIDE, tiny.SIDE)


def test_views_are_padded_to_squares_in_the_order_in_which_they_are_given(loaded):
    pictures = tiny.views()
    actual = inputs(loaded, pictures)["pixel_values"]
    expected = torch.stack([pixels_of(picture) for picture in pictures])
    assert (actual - expected).abs().max() < 0.02  # Pillow rounds to whole colours


def test_the_placeholder_of_a_picture_is_never_generated(loaded):
    given = inputs(loaded, tiny.views())
    with torch.no_grad():
        loaded.model.lm_head.weight[loaded.model.config.image_token_id] = 1e3
        ids = loaded.model.generate(**given, max_new_tokens=4, do_sample=False)
        loaded.model.lm_head.weight[loaded.model.config.image_token_id] = 0
    assert (ids[0, given["input_ids"].shape[1] :] != loaded.model.config.image_token_id).all()


@pytest.mark.parametrize("method", [AutoPrune(Budget.ratio(0.5)), AutoPrune(12, first_cut="peek")])
def test_pruning_six_views_equals_the_oracle(loaded, method):
    given = dict(inputs(loaded, tiny.views()))
    given["input_ids"] = given["input_ids"].long()
    result = oracle.compare(loaded.model, given, method, steps=3)
    assert result.worst < 2e-4
    (sample,) = result.samples
    assert sum(sample.tokens_per_layer) == 6 * (24 if method.budget.kind == "ratio" else 12)
    assert max(result.effect) > 1


@pytest.mark.parametrize("method", [AutoPrune(12, first_cut="pre_llm"), create("fastervlm", 12)])
def test_what_needs_scores_of_patches_says_that_there_are_none(loaded, method):
    given = inputs(loaded, tiny.views())
    with (
        pytest.raises(ValueError, match=r"`autoprune families` says why"),
        torch.no_grad(),
        method(loaded.model),
    ):
        loaded.model(**given)


def test_six_pictures_are_needed():
    assert len(CAMERAS) == len(LABELS) == 6
    with pytest.raises(ValueError, match=r"takes 6 pictures, in the order CAM_FRONT, .*; got 5"):
        driving_messages(tiny.views()[:5], QUESTION)


@pytest.mark.parametrize(
    ("without", "said"),
    [
        ("img_adapter", "lack the driving adapter"),
        ("vision_tower", "lack the vision tower"),
        ("lm_head", "lack the language model's head"),
        ("layers.2.mlp.down_proj", "lack model.language_model.layers.2.mlp.down_proj.weight"),
    ],
)
def test_a_checkpoint_that_lacks_a_part_is_refused(tmp_path, without, said):
    weights = tiny.write_checkpoint(tmp_path / "whole")
    for file in (tmp_path / "whole").glob("*.bin"):
        file.unlink()
    kept = {name: weight for name, weight in weights.items() if without not in name}
    torch.save(kept, tmp_path / "whole" / "pytorch_model.bin")
    with pytest.raises(ValueError, match=said):
        convert(tmp_path / "whole", tmp_path / "converted")


def test_what_is_no_checkpoint_is_refused(tmp_path):
    with pytest.raises(ValueError, match="is no checkpoint of Senna"):
        convert(tmp_path, tmp_path / "out")
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(ValueError, match="is not that of Senna's own code"):
        convert(tmp_path, tmp_path / "out")
    (tmp_path / "config.json").write_text('{"hidden_size": 64}')
    with pytest.raises(ValueError, match="holds no weights"):
        convert(tmp_path, tmp_path / "out")
    (tmp_path / "pytorch_model.bin").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="cannot be read"):
        convert(tmp_path, tmp_path / "out")


def changed(folder: Path, config: dict | None = None, **weights: torch.Tensor | None) -> Path:
    """A checkpoint with some other weights, None for none, and other settings."""
    own = tiny.write_checkpoint(folder, as_bin=False) | weights
    save_file({name: w.contiguous() for name, w in own.items() if w is not None}, folder / FILE)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | (config or {})))
    return folder


FILE, TOWER = "model.safetensors", "model.vision_tower.vision_tower.vision_model."


@pytest.mark.parametrize(
    ("weights", "config", "said"),
    [
        ({f"{TOWER}embeddings.patch_embedding.weight": None}, {}, "lack the vision tower"),
        ({f"{TOWER}encoder.layers.0.mlp.fc1.weight": None}, {}, "layers.0.mlp.fc1.weight"),
        ({f"{TOWER}embeddings.patch_embedding.weight": torch.zeros(5, 5)}, {}, "shape [5, 5]"),
        ({"model.img_adapter.adapter.0.weight": torch.zeros(5)}, {}, "shape [5] in the driving"),
        ({"lm_head.weight": torch.zeros(3, tiny.HIDDEN)}, {}, "head has the shape [3, 64]"),
        ({}, {"hidden_size": "x"}, "make no Senna"),
        ({}, {"num_attention_heads": 0}, "no Senna"),
        ({}, {"mm_vision_select_layer": "x"}, "make no Senna"),
    ],
)
def test_damaged_weights_and_sizes_are_refused_in_one_line(tmp_path, weights, config, said):
    folder = changed(tmp_path / "upstream", config, **weights)
    with pytest.raises(ValueError, match=re.escape(said)) as caught:
        convert(folder, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_folder_with_files_is_not_overwritten(tmp_path):
    """Least of all the checkpoint itself."""
    tiny.write_checkpoint(tmp_path / "upstream", as_bin=False)
    before = (tmp_path / "upstream" / FILE).read_bytes()
    with pytest.raises(ValueError, match="is there already; give a new or empty folder"):
        convert(tmp_path / "upstream", tmp_path / "upstream")
    assert (tmp_path / "upstream" / FILE).read_bytes() == before
    with pytest.raises(ValueError, match="is there already"):
        convert(tmp_path / "upstream", tmp_path / "upstream" / FILE)


def test_a_tokenizer_that_cannot_be_read_is_refused(tmp_path, monkeypatch):
    tiny.write_checkpoint(tmp_path)
    (tmp_path / "tokenizer.json").write_text("nothing")
    with pytest.raises(ValueError, match=r"the tokenizer in .* cannot be read"):
        convert(tmp_path, tmp_path / "out")
    (tmp_path / "tokenizer.json").rename(tmp_path / "tokenizer.model")
    monkeypatch.setattr("autoprune.models.senna.convert.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install sentencepiece protobuf"):
        convert(tmp_path, tmp_path / "out")


def test_an_unconverted_checkpoint_says_how_to_convert_it(upstream):
    with pytest.raises(ValueError, match=r"python -m autoprune\.models\.senna"):
        load_model(str(upstream[0]))


def test_the_command_converts_and_refuses_in_one_line(upstream, tmp_path, monkeypatch, capsys):
    command = [sys.executable, "-m", "autoprune.models.senna"]
    done = subprocess.run(
        [*command, upstream[0], tmp_path / "out"], capture_output=True, text=True, check=True
    )
    assert done.stdout == f"wrote {tmp_path / 'out'}\n"
    assert (tmp_path / "out" / "model.safetensors").is_file()
    monkeypatch.setattr(sys, "argv", ["senna", str(tmp_path), str(tmp_path / "out")])
    assert main() == 1
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1
