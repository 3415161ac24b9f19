"""How many kernels a prefill launches, pruned over plain: what a GPU's launch time is made of.

A single prompt on a GPU is bound by launches. They can be counted anywhere: this counts the ATen
operations that launch a kernel, on narrow 32-layer decoders on a CPU. Views and empty tensors launch
nothing. A sort counts as 4, as that many kernels do it on CUDA.

    python benchmarks/launches.py --output benchmarks/results/launches.json
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import transformers
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from autoprune import AutoPrune
from autoprune.bench.launches import SORTS, Launches, decoder_only, kernels
from autoprune.engine.cache.argument import as_argument, cache_of
from autoprune.methods.base import Method

LAYERS, TEXT, PATCHES = 32, 64, 576
BITS = 0.9  # of a single prompt; those of a batch are spread from 0.1 to 1.7 around it
IMAGE = 9


@dataclass(frozen=True)
class GivenInformation(AutoPrune):
    """AutoPrune with a mutual information that does not depend on random weights."""

    def _information_for_schedule(self, measured: list[float]) -> list[float]:
        number = len(measured)
        spread = [BITS + 0.8 * (2 * i / max(number - 1, 1) - 1) for i in range(number)]
        return [BITS] if number == 1 else spread


def build() -> LlavaForConditionalGeneration:
    """A narrow LLaVA with 32 decoder layers in bfloat16."""
    text = LlamaConfig(
        vocab_size=100,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=8192,
    )
    vision = CLIPVisionConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=336,
        patch_size=14,
        projection_dim=64,
    )
    config = LlavaConfig(text_config=text, vision_config=vision, image_token_id=IMAGE)
    torch.manual_seed(0)
    return LlavaForConditionalGeneration(config).bfloat16().eval()


def prompts(batch: int, images: int) -> dict[str, torch.Tensor]:
    """Random pictures and words, half of the words before the pictures."""
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(10, 100, (batch, TEXT), generator=generator)
    pictures = torch.full((batch, images * PATCHES), IMAGE)
    ids = torch.cat([words[:, : TEXT // 2], pictures, words[:, TEXT // 2 :]], dim=1)
    pixels = torch.randn(batch * images, 3, 336, 336, generator=generator).bfloat16()
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": pixels,
    }


@torch.inference_mode()
def count(model: Any, inputs: dict[str, torch.Tensor], method: Method | None) -> dict[str, Any]:
    """Launches of a prefill, and of the second step of decoding behind it."""
    with nullcontext() if method is None else method(model) as trace:
        model(**inputs, logits_to_keep=1)  # what is made once per model
        with Launches() as launches, decoder_only(model, launches) as decoder:
            out = model(**inputs, use_cache=True, logits_to_keep=1)
        token, mask = out.logits[:, -1:].argmax(-1), inputs["attention_mask"]
        for _ in range(2):
            mask = torch.nn.functional.pad(mask, (0, 1), value=1)
            given = as_argument(model, cache_of(out))
            with Launches() as step:
                out = model(input_ids=token, attention_mask=mask, use_cache=True, **given)
    schedules = [] if trace is None else [s.tokens_per_layer for s in trace.samples[-len(mask) :]]
    return {
        "prefill": launches.total,
        "decoder": kernels(decoder),
        "operations": sum(launches.seen.values()),
        "sorts": sum(launches.seen[name] for name in SORTS),
        "step": step.total,
        "copies": launches.copies,
        "cuts": sum(any(s[i] < s[i - 1] for s in schedules) for i in range(1, LAYERS) if schedules),
        "seen": dict(launches.seen.most_common()),
    }


CASES = {
    "batch 1, 64 of 576": (1, 1, 64),
    "batch 1, 320 of 2880": (1, 5, 320),
    "ragged batch of 8, 64 of 576": (8, 1, 64),
}

# The setting that is used by default, and others of how often tokens are ranked.
RANK_EVERY = {"default": {}, "every cut": {"rank_every": 1}, "once": {"rank_every": 32}}


def compare(
    model: Any, batch: int, images: int, budget: int, settings: dict[str, dict[str, Any]]
) -> dict[str, dict[str, Any]]:
    """Pruned beside plain, for each setting: the ratio of launches, and what a cut and a step of decoding add.

    The ratio is of the decoder's prefill; what pruning adds around it counts as the decoder's.
    """
    inputs = prompts(batch, images)
    plain = count(model, inputs, None)
    found = {}
    for name, options in settings.items():
        pruned = count(model, inputs, GivenInformation(budget, **options))
        added = pruned["prefill"] - plain["prefill"]
        operations = pruned["operations"] - plain["operations"]
        found[name] = {
            "plain": plain["decoder"],
            "pruned": plain["decoder"] + added,
            "ratio": round(1 + added / plain["decoder"], 3),
            "operations per cut": round(operations / max(pruned["cuts"], 1), 1),
            "copies": pruned["copies"],
            "step added": pruned["step"] - plain["step"],
        }
    return found


def measure(cases: dict[str, tuple[int, int, int]] = CASES) -> dict[str, dict[str, Any]]:
    """All cases, with the default setting; the first one with all settings."""
    model, found = build(), {}
    for name, case in cases.items():
        settings = RANK_EVERY if name == next(iter(CASES)) else {"default": {}}
        for setting, row in compare(model, *case, settings).items():
            found[name if setting == "default" else f"{name}, ranked {setting}"] = row
    return found


@torch.inference_mode()
def python_time(rounds: int = 40) -> dict[str, float]:
    """What a cut and a prefill cost in Python, in layers that have next to nothing to compute.

    Minima of runs in turns, in float32 on one thread. A cut is the difference between 30 and 2 cuts that one
    ranking decides. What is fixed is a budget of all tokens, which measures and cuts nothing, less the plain
    model.
    """
    torch.set_num_threads(1)
    model, inputs, short = build().float(), prompts(1, 1), prompts(1, 0)
    inputs["pixel_values"] = inputs["pixel_values"].float()
    del short["pixel_values"]
    many, few = (GivenInformation(64, rank_every=32, cut_every=every) for every in (1, 29))
    runs: dict[str, tuple[Method | None, dict[str, torch.Tensor]]] = {
        "short": (None, short),
        "plain": (None, inputs),
        "all": (AutoPrune(PATCHES), inputs),
        "many": (many, inputs),
        "few": (few, inputs),
    }
    best, cuts = dict.fromkeys(runs, float("inf")), {}
    for _ in range(rounds):
        for name, (method, given) in runs.items():
            with nullcontext() if method is None else method(model) as trace:
                start = time.perf_counter()
                model(**given, logits_to_keep=1)
                best[name] = min(best[name], time.perf_counter() - start)
            if trace is not None:
                schedule = trace.samples[0].tokens_per_layer
                cuts[name] = sum(a > b for a, b in pairwise(schedule))
    layer = best["short"] / LAYERS
    return {
        "short layer, ms": round(1000 * layer, 3),
        "cut, in short layers": round(
            (best["many"] - best["few"]) / (cuts["many"] - cuts["few"]) / layer, 2
        ),
        "fixed, in short layers": round((best["all"] - best["plain"]) / layer, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", help="write the counts as JSON to this file, too")
    output = parser.parse_args().output
    counts = measure()
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    print(f"{LAYERS} layers, bfloat16, {platform.machine()} CPU, {versions}")
    for name, row in counts.items():
        print(f"{name}: " + ", ".join(f"{key} {value}" for key, value in row.items()))
    python = python_time()
    print(", ".join(f"{key} {value}" for key, value in python.items()))
    if output:
        with open(output, "w") as file:
            json.dump({"versions": versions, "launches": counts, "python": python}, file, indent=1)


if __name__ == "__main__":
    main()
