"""Tiny random models of every supported family, with inputs that need no processor.

    model = build("llava", "sdpa")
    batch = inputs("llava", model, "padded3")
    model.generate(**batch, max_new_tokens=4)

Weights are seeded and scaled so that attention is spiky and logits have a standard deviation of
about 5: taking visual tokens away changes them by more than 1. A batch is "single", "padded3"
(three prompts of different text and visual lengths, the last with two pictures where the family
allows it) or "padded3_text" (the prompt in the middle has no picture at all).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import transformers
from packaging.version import Version
from torch import nn

from tests.zoo_core import CORE
from tests.zoo_families import FAMILIES, Family
from tests.zoo_pictures import (
    BOS,
    HEAD_DIM,
    HEADS,
    HIDDEN,
    IMAGE,
    LAYERS,
    PAD,
    SPECIAL,
    VIDEO,
    VOCABULARY,
    Payload,
    Visual,
    words,
)

__all__ = [
    "BOS",
    "CORE",
    "EVERY_MODE",
    "FAMILIES",
    "HEADS",
    "HEAD_DIM",
    "HIDDEN",
    "IMAGE",
    "LAYERS",
    "PAD",
    "VIDEO",
    "VOCABULARY",
    "build",
    "build_family",
    "family_of",
    "inputs",
    "randomise",
    "visual_mask",
]

# The families on which every way of generating is tried.
EVERY_MODE = ("llava", "qwen2_5_vl")
# Since then `generate` encodes the pictures before its loop, once, and hands out the features. Before, it
# repeats pixels for copies and beams, and gets those of a prompt with several pictures out of order.
SINCE_5_19 = Version(transformers.__version__) >= Version("5.19")


def family_of(name: str) -> Family:
    return FAMILIES.get(name) or CORE[name]


def build(name: str, attn_implementation: str = "sdpa", seed: int = 0) -> nn.Module:
    """A new model of the family in eval mode and float32; the same seed gives the same weights."""
    return build_family(family_of(name), attn_implementation, seed)


def class_of(family: Family) -> type:
    """The class of its models, one of transformers or of this package."""
    return getattr(transformers, family.model) if isinstance(family.model, str) else family.model


def build_family(family: Family, attn_implementation: str = "sdpa", seed: int = 0) -> nn.Module:
    """`build` for a family that is none of `FAMILIES`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = class_of(family)._from_config(
            family.config(), attn_implementation=attn_implementation
        )
    randomise(model, seed)
    model.generation_config = transformers.GenerationConfig(pad_token_id=PAD, bos_token_id=BOS)
    return model.eval()


def inputs(
    name: str,
    model: nn.Module,
    batch: str = "single",
    media: str = "image",
    padding_side: str = "left",
    seed: int = 0,
    only: int | None = None,
) -> dict[str, torch.Tensor]:
    """Arguments of `model.generate` and `model.forward` for one of the batches of this module.

    `only` takes one prompt of the batch, unpadded and alone.
    """
    family = family_of(name)
    if media not in family.media:
        raise ValueError(f"{name} has no {media}; it has {family.media}")
    plans = {
        "single": [(5, [0], 6)],
        "padded3": [(3, [1], 9), (6, [0], 4), (4, [2, 0], 7)],
        "padded3_text": [(3, [1], 5), (6, [], 8), (4, [2], 11)],
    }
    generator = torch.Generator().manual_seed(1000 + seed)
    make = family.image if media == "image" else family.video
    prompts, payloads = [], []
    for before, which, after in plans[batch]:
        if len(which) > 1 and not (family.several_images and media == "image"):
            which = which[:1]
        visuals = [make(w, generator) for w in which]
        prompts.append(_prompt(before, visuals, after, generator, family.image_first))
        payloads.append([visual.payload for visual in visuals])
    if only is not None:
        prompts, payloads = [prompts[only]], [payloads[only]]
    arguments = _pad(prompts, padding_side)
    if family.token_types:
        arguments[family.token_types] = _token_types(arguments["input_ids"], family, media)
    collate = family.collate or _concatenate
    return arguments | (collate(payloads) if any(payloads) else {})


def visual_mask(model: nn.Module, input_ids: torch.Tensor) -> torch.Tensor:
    """Which positions hold image or video features: bool [batch, length]."""
    ids = [model.config.image_token_id]
    if getattr(model.config, "video_token_id", None) is not None:
        ids.append(model.config.video_token_id)
    return torch.isin(input_ids, torch.tensor(ids))


def randomise(model: nn.Module, seed: int) -> None:
    """Replace the weights: unit-variance features, spiky attention, logits of deviation 5."""
    generator = torch.Generator().manual_seed(seed)
    # Gemma 4 does not divide scores by the root of the head's size.
    unscaled = model.get_decoder().config.model_type == "gemma4_text"

    def normal(parameter: torch.Tensor, std: float) -> torch.Tensor:
        return torch.randn(parameter.shape, generator=generator) * std

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            leaf = name.split(".")[-2]
            if parameter.ndim < 2:
                lift = (-0.3 if unscaled else 0.5) if leaf in ("q_norm", "k_norm") else 0.0
                # Linear attention that remembers for some ten tokens, not for one.
                lift = -4.0 if name.endswith("A_log") else lift
                parameter.add_(lift + normal(parameter, 0.1))
            elif "embed" in name and "patch" not in name:
                # Gemma multiplies its word embeddings by the root of the hidden size.
                scaled = "embed_tokens" in name and "gemma" in model.get_decoder().config.model_type
                parameter.copy_(normal(parameter, HIDDEN**-0.5 if scaled else 1.0))
            else:
                fan_in = parameter[0].numel()
                gain = {"q_proj": 2.0, "k_proj": 2.0, "qkv": 1.6, "lm_head": 5.0}.get(leaf, 1.0)
                parameter.copy_(normal(parameter, gain / fan_in**0.5))
        # A generated placeholder would ask for a picture that is not there.
        model.get_output_embeddings().weight[list(SPECIAL)] = 0.0


def _prompt(
    before: int,
    visuals: Sequence[Visual],
    after: int,
    generator: torch.Generator,
    image_first: bool,
) -> list[int]:
    ids = [] if image_first and visuals else [BOS, *words(before, generator)]
    for visual in visuals:
        ids += [*visual.ids, *words(2, generator)]
    return ids + ([BOS] if image_first else []) + words(after, generator)


def _pad(prompts: list[list[int]], side: str) -> dict[str, torch.Tensor]:
    length = max(map(len, prompts))
    ids = torch.full((len(prompts), length), PAD)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        place = slice(length - len(prompt), length) if side == "left" else slice(0, len(prompt))
        ids[row, place] = torch.tensor(prompt)
        mask[row, place] = 1
    return {"input_ids": ids, "attention_mask": mask}


def _token_types(input_ids: torch.Tensor, family: Family, media: str) -> torch.Tensor:
    types = torch.zeros_like(input_ids)
    for token, kind in family.type_of.items():
        types[input_ids == token] = kind
    if media == "video" and family.model.startswith("Glm"):
        types[types > 0] = 2  # frames of a video use the image token
    return types


def _concatenate(payloads: list[list[Payload]]) -> Payload:
    """Join along dimension 0, zero-padding the rest to the largest (tiles of a picture, pixels)."""
    flat = [payload for prompt in payloads for payload in prompt]
    joined = {}
    for key in flat[0]:
        tensors = [payload[key] for payload in flat]
        shape = [max(t.shape[d] for t in tensors) for d in range(1, tensors[0].ndim)]
        padded = [t.new_zeros(t.shape[0], *shape) for t in tensors]
        for target, source in zip(padded, tensors, strict=True):
            target[tuple(slice(0, size) for size in source.shape)] = source
        joined[key] = torch.cat(padded)
    return joined
