"""A tiny checkpoint of CogVLM as it is published: names, configuration and a tokenizer of words."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from tests.models.cogvlm_by_hand import Sizes

VOCABULARY, HIDDEN, INNER, LAYERS, HEADS = 140, 64, 96, 2, 4
TOWER, TOWER_INNER, TOWER_LAYERS, TOWER_HEADS, SIDE, PATCH = 32, 48, 2, 2, 56, 14
SIZES = Sizes(HEADS, LAYERS, TOWER_HEADS, TOWER_LAYERS, PATCH)
PATCHES = (SIDE // PATCH) ** 2
# The tokenizer's; every other id is a word that no test says.
WORDS = [
    "<unk>",
    "<s>",
    "</s>",
    "Question",
    ":",
    "Answer",
    "Short",
    "answer",
    "what",
    "?",
    "a",
    "cat",
]

CONFIG = {
    "architectures": ["CogVLMForCausalLM"],
    "auto_map": {
        "AutoConfig": "configuration_cogvlm.CogVLMConfig",
        "AutoModelForCausalLM": "modeling_cogvlm.CogVLMForCausalLM",
    },
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "hidden_act": "silu",
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "torch_dtype": "float32",
    "template_version": "chat",
    "vision_config": {
        "hidden_size": TOWER,
        "intermediate_size": TOWER_INNER,
        "num_hidden_layers": TOWER_LAYERS,
        "num_heads": TOWER_HEADS,
        "num_positions": 1 + PATCHES,
        "in_channels": 3,
        "image_size": SIDE,
        "patch_size": PATCH,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-6,
        "dropout_prob": 0.0,
    },
}


def shapes() -> dict[str, tuple[int, ...]]:
    """Every tensor of the published checkpoint."""
    found: dict[str, tuple[int, ...]] = {
        "lm_head.weight": (VOCABULARY, HIDDEN),
        "model.embed_tokens.weight": (VOCABULARY, HIDDEN),
        "model.norm.weight": (HIDDEN,),
        "model.vision.boi": (1, 1, HIDDEN),
        "model.vision.eoi": (1, 1, HIDDEN),
        "model.vision.patch_embedding.cls_embedding": (1, TOWER),
        "model.vision.patch_embedding.proj.weight": (TOWER, 3, PATCH, PATCH),
        "model.vision.patch_embedding.proj.bias": (TOWER,),
        "model.vision.patch_embedding.position_embedding.weight": (1 + PATCHES, TOWER),
        "model.vision.linear_proj.linear_proj.weight": (HIDDEN, TOWER),
        "model.vision.linear_proj.norm1.weight": (HIDDEN,),
        "model.vision.linear_proj.norm1.bias": (HIDDEN,),
        "model.vision.linear_proj.gate_proj.weight": (INNER, HIDDEN),
        "model.vision.linear_proj.dense_h_to_4h.weight": (INNER, HIDDEN),
        "model.vision.linear_proj.dense_4h_to_h.weight": (HIDDEN, INNER),
    }
    for layer in range(LAYERS):
        name = f"model.layers.{layer}."
        for expert in ("vision", "language"):
            found |= {
                f"{name}self_attn.{expert}_expert_query_key_value.weight": (3 * HIDDEN, HIDDEN),
                f"{name}self_attn.{expert}_expert_dense.weight": (HIDDEN, HIDDEN),
                f"{name}mlp.{expert}_mlp.gate_proj.weight": (INNER, HIDDEN),
                f"{name}mlp.{expert}_mlp.up_proj.weight": (INNER, HIDDEN),
                f"{name}mlp.{expert}_mlp.down_proj.weight": (HIDDEN, INNER),
            }
        found |= {
            f"{name}{norm}.weight": (HIDDEN,)
            for norm in ("input_layernorm", "post_attention_layernorm")
        }
    for layer in range(TOWER_LAYERS):
        name = f"model.vision.transformer.layers.{layer}."
        for part, (out, into) in {
            "attention.query_key_value": (3 * TOWER, TOWER),
            "attention.dense": (TOWER, TOWER),
            "mlp.fc1": (TOWER_INNER, TOWER),
            "mlp.fc2": (TOWER, TOWER_INNER),
        }.items():
            found |= {f"{name}{part}.weight": (out, into), f"{name}{part}.bias": (out,)}
        for norm in ("input_layernorm", "post_attention_layernorm"):
            found |= {f"{name}{norm}.weight": (TOWER,), f"{name}{norm}.bias": (TOWER,)}
    return found


def tensors(seed: int = 0) -> dict[str, Tensor]:
    """Random ones, scaled so that attention is uneven and logits are of size 5; experts differ."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, shape in shapes().items():
        values = torch.randn(shape, generator=generator)
        if len(shape) == 1:
            found[name] = values * 0.1 + (1.0 if name.endswith("weight") else 0.0)
        elif "embed" in name and "proj" not in name:
            found[name] = values
        else:
            gain = 5.0 if name == "lm_head.weight" else 2.0 if "query_key_value" in name else 1.0
            found[name] = values * gain / values[0].numel() ** 0.5
    return found


def tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {word: number for number, word in enumerate(WORDS)}
    vocabulary |= {f"w{number}": number for number in range(len(WORDS), VOCABULARY)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
    )


def write(folder: Path, given: dict[str, Tensor], files: int = 2) -> Path:
    """The checkpoint in so many files, with its tokenizer in a folder of its own beside it."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    if files == 1:
        save_file(given, folder / "model.safetensors")
        return folder
    names = sorted(given)
    places = {}
    for number in range(files):
        own = names[number::files]
        file = f"model-{number + 1:05d}-of-{files:05d}.safetensors"
        save_file({name: given[name] for name in own}, folder / file)
        places |= dict.fromkeys(own, file)
    index = {"metadata": {}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder
