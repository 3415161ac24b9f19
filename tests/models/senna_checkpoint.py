"""A tiny random checkpoint as Senna's own code writes one: names of weights, config.json and tokenizer."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaTokenizer,
)

PATCHES, VIEW_TOKENS, SIDE, HIDDEN = 16, 8, 56, 64
TEXT = LlamaConfig(
    vocab_size=260,
    hidden_size=HIDDEN,
    intermediate_size=96,
    num_hidden_layers=6,
    num_attention_heads=4,
    num_key_value_heads=4,
    max_position_embeddings=512,
    rms_norm_eps=1e-5,
)
VISION = CLIPVisionConfig(
    hidden_size=128,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=2,
    image_size=SIDE,
    patch_size=14,
)


def write_checkpoint(folder: Path, seed: int = 0, as_bin: bool = True) -> dict[str, torch.Tensor]:
    """Write it, and return its weights by the names of Senna's code."""
    weights = random_weights(seed)
    folder.mkdir(parents=True, exist_ok=True)
    if as_bin:
        names = sorted(weights)
        for part in (0, 1):
            half = {name: weights[name] for name in names[part::2]}
            torch.save(half, folder / f"pytorch_model-0000{part + 1}-of-00002.bin")
    else:
        from safetensors.torch import save_file

        save_file(weights, folder / "model.safetensors")
    written = TEXT.to_dict() | {
        "model_type": "llava_llama",
        "architectures": ["SennaLlavaLlamaForCausalLM"],
        "mm_vision_tower": "/somewhere/else/clip-vit-large-patch14-336",
        "mm_hidden_size": VISION.hidden_size,
        "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch",
        "mm_projector_type": "mlp2x_gelu",
        "image_aspect_ratio": "pad",
    }
    (folder / "config.json").write_text(json.dumps(written), encoding="utf-8")
    tokenizer().save_pretrained(folder)
    return weights


def random_weights(seed: int = 0) -> dict[str, torch.Tensor]:
    """Unit features, spiky attention, and logits of deviation 5, as in the zoo."""
    with torch.random.fork_rng(devices=[]):
        text, vision = LlamaForCausalLM(TEXT), CLIPVisionModel(VISION)
    names = {
        f"model.vision_tower.vision_tower.vision_model.{n}": p for n, p in vision_state(vision)
    }
    names |= text.state_dict()
    for layer, shape in {
        "mm_projector.0": (HIDDEN, VISION.hidden_size),
        "mm_projector.2": (HIDDEN, HIDDEN),
        "img_adapter.adapter.0": (VIEW_TOKENS, PATCHES),
        "img_adapter.adapter.2": (VIEW_TOKENS, VIEW_TOKENS),
        "img_adapter.adapter.4": (VIEW_TOKENS, VIEW_TOKENS),
    }.items():
        names[f"model.{layer}.weight"] = torch.zeros(shape)
        names[f"model.{layer}.bias"] = torch.zeros(shape[0])
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, parameter in sorted(names.items()):
        drawn = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim < 2:
            weights[name] = (1.0 if "norm" in name and "bias" not in name else 0.0) + 0.1 * drawn
        elif "embed_tokens" in name:
            weights[name] = drawn
        else:
            gain = {"q_proj": 2.0, "k_proj": 2.0, "lm_head": 5.0}.get(name.split(".")[-2], 1.0)
            weights[name] = drawn * gain / parameter[0].numel() ** 0.5
    # A table that old versions of transformers wrote, too.
    ids = "model.vision_tower.vision_tower.vision_model.embeddings.position_ids"
    weights[ids] = torch.arange(PATCHES + 1)[None]
    return weights


def vision_state(vision: CLIPVisionModel) -> list[tuple[str, torch.Tensor]]:
    """Names without the "vision_model." that some versions of transformers put before them."""
    return [(n.removeprefix("vision_model."), p) for n, p in vision.state_dict().items()]


def tokenizer() -> LlamaTokenizer:
    """Llama's own, with one token for each character."""
    characters = [*(chr(code) for code in range(33, 127)), "\n", "▁"]
    words = ["<unk>", "<s>", "</s>", *characters]
    return LlamaTokenizer({word: number for number, word in enumerate(words)}, [])


def views(seed: int = 0) -> list[Image.Image]:
    """Six pictures in nuScenes' shape, 16 : 9, each of other colours."""
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, (6, 36, 64, 3), dtype=np.uint8)
    return [Image.fromarray(one).resize((160, 90)) for one in pixels]
