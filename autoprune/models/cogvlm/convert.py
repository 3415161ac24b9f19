"""From the published checkpoint of CogVLM to one that transformers 5 loads.

Tensors keep their values; only names change. One file is held in memory at a time.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, GenerationConfig
from transformers.image_utils import PILImageResampling
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from ..checkpoints import check_output, one_error, read_object
from .configuration import CogVLMConfig
from .model import CogVLMForConditionalGeneration
from .processing import BOI, EOI, IMAGE, TEMPLATES, CogVLMProcessor, add_tokens

TOKENIZER = "lmsys/vicuna-7b-v1.5"
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"

# From this package's names to the published ones; the first that fits counts.
_RENAMES = (
    (r"^model\.(boi|eoi)$", r"model.vision.\1"),
    (r"^model\.projector\.linear\.", "model.vision.linear_proj.linear_proj."),
    (r"^model\.projector\.norm\.", "model.vision.linear_proj.norm1."),
    (r"^model\.projector\.gate_proj\.", "model.vision.linear_proj.gate_proj."),
    (r"^model\.projector\.up_proj\.", "model.vision.linear_proj.dense_h_to_4h."),
    (r"^model\.projector\.down_proj\.", "model.vision.linear_proj.dense_4h_to_h."),
    (r"^model\.vision_tower\.layers\.", "model.vision.transformer.layers."),
    (r"^model\.vision_tower\.class_embedding$", "model.vision.patch_embedding.cls_embedding"),
    (r"^model\.vision_tower\.patch_embedding\.", "model.vision.patch_embedding.proj."),
    (r"^model\.vision_tower\.position_", "model.vision.patch_embedding.position_"),
    (
        r"^model\.language_model\.(layers\.\d+\.self_attn\.)(query_key_value|dense)\.(vision|language)\.",
        r"model.\1\3_expert_\2.",
    ),
    (r"^model\.language_model\.(layers\.\d+\.mlp\.)(vision|language)\.", r"model.\1\2_mlp."),
    (r"^model\.language_model\.", "model."),
)
# Computed, not loaded.
_LEFT_OUT = re.compile(r"\.rotary_emb\.inv_freq$")


def published_name(name: str) -> str:
    """What the published checkpoint calls one of this package's tensors."""
    for pattern, replacement in _RENAMES:
        renamed, found = re.subn(pattern, replacement, name)
        if found:
            return renamed
    return name


def convert(
    checkpoint: Path | str,
    output: Path | str,
    tokenizer: str = TOKENIZER,
    template: str | None = None,
) -> None:
    """Write the checkpoint in `output` for transformers 5.

    Args:
        checkpoint: folder of the published one: config.json and safetensors files.
        output: a new or empty folder.
        tokenizer: folder or hub name.
        template: one of `TEMPLATES`; by default the one that the checkpoint names.

    Raises:
        ValueError: a folder that cannot be used; names or shapes of tensors that are not CogVLM's; a tokenizer
            of another vocabulary.
    """
    checkpoint, output = Path(checkpoint), Path(output)
    if not (checkpoint / "config.json").is_file():
        raise ValueError(
            f"{str(checkpoint)!r} holds no checkpoint (no config.json); fetch the published one by "
            "`hf download zai-org/cogvlm-chat-hf --local-dir FOLDER`"
        )
    check_output(output)
    published = read_object(checkpoint / "config.json")
    config = read_config(published)
    template = template or published.get("template_version", "chat")
    if template not in TEMPLATES:
        raise ValueError(f"template must be one of {', '.join(TEMPLATES)}, got {template!r}")
    with one_error("the sizes in config.json of the checkpoint fit no CogVLM"):
        names = _names(config)
    files = _files(checkpoint)
    _check_tensors(files, names)
    processor = _processor(config, tokenizer, TEMPLATES[template])
    output.mkdir(parents=True, exist_ok=True)
    _write_tensors(files, names, output)
    processor.save_pretrained(output)
    ids = {name: getattr(config.text_config, name) for name in _GENERATION}
    GenerationConfig(**ids).save_pretrained(output)
    # Last, so that a folder with a configuration is whole.
    config.save_pretrained(output)


_GENERATION = ("bos_token_id", "eos_token_id", "pad_token_id")
_TEXT = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "hidden_act",
    "max_position_embeddings",
    "rms_norm_eps",
    *_GENERATION,
)
_VISION = {
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_hidden_layers": "num_hidden_layers",
    "num_attention_heads": "num_heads",
    "num_channels": "in_channels",
    "image_size": "image_size",
    "patch_size": "patch_size",
    "hidden_act": "hidden_act",
    "layer_norm_eps": "layer_norm_eps",
}


def read_config(published: dict[str, Any]) -> CogVLMConfig:
    """This package's configuration from the published config.json.

    Raises:
        ValueError: it is of another model, or lacks a size.
    """
    tower = published.get("vision_config")
    if not isinstance(tower, dict) or "num_multi_query_heads" in published:
        raise ValueError(
            f"config.json is of {published.get('architectures')}, not of CogVLM-17B (CogVLM2 is another "
            "model); take zai-org/cogvlm-chat-hf"
        )
    missing = [name for name in _TEXT if name not in published]
    missing += [f"vision_config.{name}" for name in _VISION.values() if name not in tower]
    if missing:
        raise ValueError(f"config.json of the checkpoint lacks {', '.join(missing)}")
    text = {name: published[name] for name in _TEXT}
    with one_error("config.json of the checkpoint is not that of CogVLM-17B"):
        config = CogVLMConfig(
            text_config=text | {"num_key_value_heads": text["num_attention_heads"]},
            vision_config={ours: tower[theirs] for ours, theirs in _VISION.items()},
            dtype=published.get("torch_dtype", published.get("dtype", "bfloat16")),
            architectures=["CogVLMForConditionalGeneration"],
        )
    # The tokens of pictures follow the vocabulary.
    first = config.text_config.vocab_size
    config.image_token_id, config.boi_token_id, config.eoi_token_id = first, first + 1, first + 2
    return config


def _names(config: CogVLMConfig) -> dict[str, tuple[str, list[int]]]:
    """By published name: this package's name of a tensor, and its shape."""
    with torch.device("meta"):
        model: Any = CogVLMForConditionalGeneration(config)
    return {
        published_name(name): (name, list(tensor.shape))
        for name, tensor in model.state_dict().items()
    }


def _files(checkpoint: Path) -> list[Path]:
    index = checkpoint / INDEX
    if index.is_file():
        with one_error(f"{str(index)!r} is no index of files"):
            shards = set(read_object(index)["weight_map"].values())
            files = [checkpoint / name for name in sorted(shards)]
    else:
        files = [checkpoint / SINGLE]
    lacking = [path.name for path in files if not path.is_file()]
    if lacking:
        raise ValueError(f"{str(checkpoint)!r} lacks {_few(lacking)}; download all of its files")
    return files


def _check_tensors(files: list[Path], names: dict[str, tuple[str, list[int]]]) -> None:
    """Compare names and shapes, which stand at the start of each file."""
    shapes: dict[str, list[int]] = {}
    for path in files:
        damaged = f"{str(path)!r} cannot be read; download it once more"
        with one_error(damaged), safe_open(path, "pt") as tensors:
            shapes |= {name: tensors.get_slice(name).get_shape() for name in tensors.keys()}  # noqa: SIM118
    found = {name for name in shapes if not _LEFT_OUT.search(name)}
    if unknown := sorted(found - names.keys()):
        raise ValueError(f"the checkpoint has tensors that CogVLM-17B has not: {_few(unknown)}")
    if missing := sorted(names.keys() - found):
        raise ValueError(f"the checkpoint lacks tensors of CogVLM-17B: {_few(missing)}")
    for name in sorted(found):
        if shapes[name] != names[name][1]:
            raise ValueError(
                f"{name} has shape {shapes[name]}, but by the sizes in config.json it is {names[name][1]}"
            )


def _write_tensors(
    files: list[Path], names: dict[str, tuple[str, list[int]]], output: Path
) -> None:
    places: dict[str, str] = {}
    size = 0
    for path in files:
        tensors = {
            names[name][0]: tensor
            for name, tensor in load_file(path).items()
            if not _LEFT_OUT.search(name)
        }
        with one_error(f"{str(output / path.name)!r} cannot be written"):
            save_file(tensors, output / path.name, metadata={"format": "pt"})
        places |= dict.fromkeys(tensors, path.name)
        size += sum(tensor.nbytes for tensor in tensors.values())
        del tensors
    if len(files) > 1:
        index = {"metadata": {"total_size": size}, "weight_map": places}
        (output / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True), "utf-8")


def _processor(config: CogVLMConfig, tokenizer: str, template: str) -> CogVLMProcessor:
    try:
        words = AutoTokenizer.from_pretrained(tokenizer, trust_remote_code=False)
    except Exception as error:
        raise ValueError(f"cannot load the tokenizer {tokenizer!r}: {error}") from error
    if len(words) != config.text_config.vocab_size:
        raise ValueError(
            f"the tokenizer {tokenizer!r} has {len(words)} tokens, but the model "
            f"{config.text_config.vocab_size}; CogVLM-17B takes that of {TOKENIZER}"
        )
    if words.pad_token is None:
        words.pad_token = words.unk_token
    add_tokens(words)
    side = config.vision_config.image_size
    pictures = CLIPImageProcessorPil(
        size={"height": side, "width": side},
        crop_size={"height": side, "width": side},
        resample=PILImageResampling.BICUBIC,
        do_center_crop=False,
    )
    processor = CogVLMProcessor(pictures, words, template, config.vision_config.patch_size)
    ids = [words.convert_tokens_to_ids(token) for token in (IMAGE, BOI, EOI)]
    if ids != [config.image_token_id, config.boi_token_id, config.eoi_token_id]:
        raise ValueError(f"the tokenizer {tokenizer!r} has tokens called {IMAGE}, {BOI} or {EOI}")
    return processor


def _few(names: Iterable[str]) -> str:
    """The first of several names, and how many there are beside them."""
    listed = list(names)
    rest = f" and {len(listed) - 5} more" if len(listed) > 5 else ""
    return ", ".join(listed[:5]) + rest
