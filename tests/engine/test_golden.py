"""`AutoPruneReference` against traces of the released code: every discrete value, logits to 1e-3."""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlavaForConditionalGeneration

from autoprune import AutoPruneReference
from autoprune.parts import mergers
from tests.golden_data import golden_root

IMAGE_TOKEN = 511
STEPS = 5


class PlansForMerging(AutoPruneReference):
    """The golden variant that budgets for merged tokens but drops them."""

    def _measure(self, seen, state):
        AutoPruneReference._measure(dataclasses.replace(self, recycle=True), seen, state)


def case_folders() -> dict[str, Path]:
    found: dict[str, Path] = {}
    for root in golden_root():
        for folder in sorted((root / "cases").glob("*/")):
            found.setdefault(folder.name, folder)
    # Where equal cluster centres exist, the variant with the stable rule replaces the plain one.
    return {n: f for n, f in found.items() if f"{n}__full_stable_ties" not in found}


CASES = case_folders()


@functools.cache
def load_model(path: Path) -> LlavaForConditionalGeneration:
    return LlavaForConditionalGeneration.from_pretrained(path).eval()


@functools.cache
def load_vision(path: Path) -> dict[str, np.ndarray]:
    return dict(np.load(path))


def inputs_of(trace: dict, model, vision: dict[str, np.ndarray], cls: np.ndarray):
    """Model inputs, and options for the context where the traces go beyond the checkpoint."""
    ids: list[int] = []
    for token in trace["input_ids"]:
        ids += [IMAGE_TOKEN] * trace["num_visual"] if token == -200 else [token]
    ids = torch.tensor([ids])
    visual, key = ids == IMAGE_TOKEN, trace["image_key"]
    given = {"vision_scores": torch.from_numpy(cls)}
    if trace["anyres"] is not None:
        embeds = model.get_input_embeddings()(ids).detach()
        embeds[visual] = torch.from_numpy(vision[f"{key}/visual_embeds"])
        return {"inputs_embeds": embeds}, {"visual_mask": visual, **given}
    pixels = torch.from_numpy(vision[f"{key}/pixel_values"].astype(np.float32))[None]
    return {"input_ids": ids, "pixel_values": pixels}, given if trace["pad_mask"] else {}


def method_of(trace: dict) -> AutoPruneReference:
    params, variant = trace["params"], trace["variant"]
    cls = PlansForMerging if variant == "no_recycle_same_schedule" else AutoPruneReference
    return cls(
        budget=params["target_token_num"],
        x0=params["x0"],
        k0=params["k0"],
        gamma=params["gamma"],
        recycle=not variant.startswith("no_recycle"),
    )


@pytest.mark.parametrize("name", CASES)
def test_reference_matches_the_released_code(name, monkeypatch):
    folder = CASES[name]
    trace = json.loads((folder / "trace.json").read_text())
    arrays = np.load(folder / "arrays.npz")
    root = folder.parents[1]
    model = load_model(root / "checkpoints" / trace["checkpoint"])
    vision = load_vision(root / "vision" / f"{trace['checkpoint']}.npz")
    inputs, options = inputs_of(trace, model, vision, arrays["cls_attention"])
    if trace["variant"] == "full_recorded_noise":
        replay_noise(monkeypatch, arrays)

    with torch.no_grad(), method_of(trace)(model, **options) as record:
        out = model.generate(
            **inputs,
            max_new_tokens=STEPS,
            min_new_tokens=STEPS,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )

    (sample,) = record.samples
    layers = trace["layers"]
    assert sample.tokens_per_layer == [layer["in_visual"] for layer in layers]
    for depth, layer in enumerate(layers[:-1]):
        originals = sorted(label for label in layer["visual_tokens_out"] if isinstance(label, int))
        assert sample.kept[depth + 1].tolist() == originals, f"after layer {depth}"
    lengths = [layer.keys.shape[-2] for layer in out.past_key_values.layers]
    assert lengths == trace["kv_len_final"]
    assert out.sequences[0, -STEPS:].tolist() == trace["generated_ids"]
    assert sample.mutual_information == pytest.approx(trace["layer1"]["mi"], abs=1e-4)
    logits = torch.stack(out.logits)[:, 0].numpy()
    np.testing.assert_allclose(logits, arrays["logits"], atol=1e-3, rtol=0)


def replay_noise(monkeypatch, arrays) -> None:
    """Break ties between cluster centres with the recorded random numbers, layer by layer."""
    noise = iter([arrays[key] for key in sorted(arrays) if key.startswith("noise_u")])
    merge = mergers.cluster_and_merge

    def noisy(x, clusters):
        return merge(x, clusters, torch.from_numpy(next(noise)))

    monkeypatch.setattr(mergers, "cluster_and_merge", noisy)


class Looks(AutoPruneReference):
    """Keeps what the first cut saw of the vision tower."""

    def select(self, seen, state):
        if seen.cut == 1:
            LOOKED.append(seen.vision_scores)
        return super().select(seen, state)


LOOKED: list[torch.Tensor] = []


def test_vision_scores_equal_the_recorded_cls_attention():
    root = golden_root()[0]
    for checkpoint in sorted((root / "checkpoints").iterdir()):
        model = load_model(checkpoint)
        vision = load_vision(root / "vision" / f"{checkpoint.name}.npz")
        for key in {name.split("/")[0] for name in vision if name.endswith("pixel_values")}:
            pixels = torch.from_numpy(vision[f"{key}/pixel_values"].astype(np.float32))[None]
            expected = vision[f"{key}/cls_attention"]
            ids = torch.tensor([[1] + [IMAGE_TOKEN] * len(expected) + [5, 6]])
            with torch.no_grad(), Looks(budget=16)(model):
                model(input_ids=ids, pixel_values=pixels)
            np.testing.assert_allclose(LOOKED.pop()[0], expected, atol=1e-6)


def test_the_committed_golden_cases_are_there():
    assert len(list((golden_root()[0] / "cases").glob("*/trace.json"))) == 15
