"""From a checkpoint in the format of Senna's own code to one for transformers."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import (
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlamaTokenizer,
    LlavaImageProcessorPil,
    PreTrainedTokenizerFast,
)

from ..checkpoints import check_output, one_error
from .model import SennaConfig, SennaForConditionalGeneration
from .processor import SennaProcessor, driving_messages

Weights = dict[str, torch.Tensor]

# The longer beginnings come first.
RENAMED = (
    ("model.vision_tower.vision_tower.vision_model.", "model.vision_tower."),
    ("model.mm_projector.0.", "model.multi_modal_projector.linear_1."),
    ("model.mm_projector.2.", "model.multi_modal_projector.linear_2."),
    ("model.img_adapter.adapter.", "model.multi_modal_projector.adapter."),
    ("model.", "model.language_model."),
)
"""What Senna's code calls its weights, and what transformers calls them, by the beginning of the name."""

EMBEDDINGS, HEAD = "model.language_model.embed_tokens.weight", "lm_head.weight"

# Of each part a tensor that the sizes are read from: what the part is called, and the tensor's dimensions.
_NEEDED = {
    "model.multi_modal_projector.adapter.0.weight": ("driving adapter (model.img_adapter)", 2),
    "model.multi_modal_projector.linear_1.weight": ("projector (model.mm_projector)", 2),
    "model.vision_tower.embeddings.position_embedding.weight": (
        "vision tower (model.vision_tower)",
        2,
    ),
    "model.vision_tower.embeddings.patch_embedding.weight": (
        "vision tower (model.vision_tower)",
        4,
    ),
    EMBEDDINGS: ("language model (model.embed_tokens)", 2),
    HEAD: ("language model's head (lm_head)", 2),
}

# Tables that transformers computes.
_COMPUTED = re.compile(r"(position_ids|inv_freq)$")

_LLAMA = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "rms_norm_eps", "max_position_embeddings", "hidden_act"),
    *("rope_theta", "rope_scaling", "bos_token_id", "eos_token_id"),
)


def convert(checkpoint: str | Path, output: str | Path) -> None:
    """Write a checkpoint of Senna's own code as one that `autoprune.loading.load_model` reads.

    Everything but the language model's sizes is read from the weights, so a path to a vision tower in the
    checkpoint's configuration is not followed. All weights are in memory at one time.

    Args:
        checkpoint: folder with config.json, the tokenizer, and the weights as .safetensors or .bin files.
        output: a new or empty folder.

    Raises:
        ValueError: a file is missing or damaged, the weights are those of another model, or the folder to write
            is not empty.
    """
    folder, output = Path(checkpoint), Path(output)
    check_output(output)
    written = _read_config(folder)
    weights = {_renamed(name): value for name, value in _weights(folder)}
    _check_names(folder, weights)
    words = weights[EMBEDDINGS].shape[0]
    tokenizer = _tokenizer(folder, words)
    image: int = tokenizer.convert_tokens_to_ids("<image>")
    for name in (EMBEDDINGS, HEAD):
        rows = weights[name].new_zeros(image + 1, weights[name].shape[1])
        rows[:words] = weights[name]
        weights[name] = rows
    with one_error(f"config.json and the weights in {str(folder)!r} make no Senna"):
        config = _config(written, weights, image)
    config.text_config.pad_token_id = tokenizer.pad_token_id
    processor = _processor(config, tokenizer)
    _check_split(processor)
    model = _model(config, weights, folder)
    with one_error(f"{str(output)!r} cannot be written"):
        model.save_pretrained(output)
        processor.save_pretrained(output)


def _read_config(folder: Path) -> dict[str, Any]:
    try:
        written = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{str(folder)!r} is no checkpoint of Senna: its config.json cannot be read ({error})"
        ) from error
    if not isinstance(written, dict) or "hidden_size" not in written:
        raise ValueError(
            f"config.json in {str(folder)!r} is not that of Senna's own code, which holds the sizes of a Llama"
        )
    return written


def _weights(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """The weights in all files, by the names of Senna's code."""
    from safetensors.torch import load_file

    files = sorted(folder.glob("*.safetensors"))
    if not files:
        # Other .bin files hold a part of these once more, or the state of training.
        files = sorted(folder.glob("pytorch_model*.bin"))
    if not files:
        raise ValueError(
            f"{str(folder)!r} holds no weights: expected .safetensors files, or pytorch_model*.bin"
        )
    for file in files:
        try:
            if file.suffix == ".bin":
                held = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
            else:
                held = load_file(file)
        except Exception as error:  # a damaged file may raise anything
            raise ValueError(f"the weights in {str(file)!r} cannot be read: {error}") from error
        yield from ((name, value) for name, value in held.items() if not _COMPUTED.search(name))


def _renamed(name: str) -> str:
    for old, new in RENAMED:
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name


def _check_names(folder: Path, weights: Mapping[str, torch.Tensor]) -> None:
    """Raise ValueError where a part of the model is missing or has another shape."""
    for name, (part, dimensions) in _NEEDED.items():
        if name not in weights:
            raise ValueError(
                f"the weights in {str(folder)!r} lack the {part}; convert a full checkpoint of Senna"
            )
        shape = list(weights[name].shape)
        if len(shape) != dimensions:
            raise ValueError(
                f"the weights in {str(folder)!r} have the shape {shape} in the {part}, which is none of Senna's"
            )
    head, words = list(weights[HEAD].shape), list(weights[EMBEDDINGS].shape)
    if head != words:
        raise ValueError(
            f"the language model's head has the shape {head}, but its embeddings {words}; expected the same"
        )


def _tokenizer(folder: Path, words: int) -> Any:
    """Llama's tokenizer as Senna's code uses it, and behind all words the placeholder of a picture."""
    if not (folder / "tokenizer.json").exists() and find_spec("sentencepiece") is None:
        raise ValueError(
            f"the tokenizer.model in {str(folder)!r} is read by a package that is not installed: pip install "
            "sentencepiece protobuf"
        )
    try:
        # Each piece of text between pictures begins with Llama's mark of a word, which is the old way.
        llama = LlamaTokenizer.from_pretrained(folder, legacy=True, add_bos_token=True)
    except Exception as error:  # each kind of file raises its own
        raise ValueError(f"the tokenizer in {str(folder)!r} cannot be read: {error}") from error
    # This class keeps the old way when it is saved.
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=llama.backend_tokenizer,
        bos_token=llama.bos_token,
        eos_token=llama.eos_token,
        unk_token=llama.unk_token,
        pad_token=llama.pad_token or llama.unk_token,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
    fillers = [f"<unused{number}>" for number in range(len(tokenizer), words)]
    tokenizer.add_tokens([*fillers, "<image>"], special_tokens=True)
    return tokenizer


def _config(written: Mapping[str, Any], weights: Mapping[str, torch.Tensor], image: int) -> Any:
    llama = {name: written[name] for name in _LLAMA if written.get(name) is not None}
    tower = "model.vision_tower."
    width, _, patch, _ = weights[f"{tower}embeddings.patch_embedding.weight"].shape
    patches = weights[f"{tower}embeddings.position_embedding.weight"].shape[0] - 1
    blocks = {name.split(".")[4] for name in weights if name.startswith(f"{tower}encoder.layers.")}
    vision = CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=weights[f"{tower}encoder.layers.0.mlp.fc1.weight"].shape[0],
        num_hidden_layers=len(blocks),
        # Every CLIP has heads of 64 channels.
        num_attention_heads=max(width // 64, 1),
        patch_size=patch,
        image_size=round(patches**0.5) * patch,
    )
    adapter = weights["model.multi_modal_projector.adapter.0.weight"]
    if adapter.shape[1] != patches:
        raise ValueError(
            f"the driving adapter takes {adapter.shape[1]} patches of a view, but the vision tower makes "
            f"{patches}"
        )
    return SennaConfig(
        vision_config=vision,
        text_config=LlamaConfig(vocab_size=image + 1, **llama),
        image_token_index=image,
        image_seq_length=adapter.shape[0],
        vision_feature_layer=written.get("mm_vision_select_layer", -2),
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
    )


def _model(config: Any, weights: Weights, folder: Path) -> SennaForConditionalGeneration:
    with (
        one_error(f"the sizes in config.json of {str(folder)!r} fit no Senna"),
        torch.device("meta"),
    ):
        model = SennaForConditionalGeneration(config)
    wanted = model.state_dict().keys()
    missing, unknown = sorted(wanted - weights.keys()), sorted(weights.keys() - wanted)
    if missing or unknown:
        said = f"lack {missing[0]}" if missing else f"hold {unknown[0]}, which Senna has not"
        raise ValueError(f"the weights in {str(folder)!r} {said}; convert a checkpoint of Senna")
    try:
        model.load_state_dict(weights, assign=True)
    except RuntimeError as error:
        last = str(error).strip().splitlines()[-1].strip()
        raise ValueError(
            f"the weights in {str(folder)!r} do not fit its config.json: {last}"
        ) from error
    dtype = weights["lm_head.weight"].dtype
    model = model.to(dtype)
    text = config.text_config
    model.generation_config = GenerationConfig(
        bos_token_id=text.bos_token_id,
        eos_token_id=text.eos_token_id,
        pad_token_id=text.pad_token_id,
        # The row that the placeholder has in the head is no word.
        suppress_tokens=[config.image_token_index],
    )
    return model


def _processor(config: Any, tokenizer: Any) -> SennaProcessor:
    side = config.vision_config.image_size
    images = LlavaImageProcessorPil(
        do_pad=True,
        size={"shortest_edge": side},
        crop_size={"height": side, "width": side},
    )
    return SennaProcessor(
        images,
        tokenizer,
        config.image_seq_length,
        patch_size=config.vision_config.patch_size,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )


def _check_split(processor: SennaProcessor) -> None:
    """Raise ValueError unless the text around pictures becomes the tokens that it becomes in Senna's code.

    That code reads each piece of text by itself and puts the pictures between.
    """
    from PIL import Image

    messages = driving_messages([Image.new("RGB", (8, 8))] * 6, "What is your plan?")
    prompt = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    tokenizer = processor.tokenizer
    expected: list[int] = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    for number, piece in enumerate(prompt.split("<image>")):
        expected += [processor.image_token_id] if number else []
        expected += tokenizer(piece, add_special_tokens=False)["input_ids"]
    if tokenizer(prompt)["input_ids"] != expected:
        raise ValueError(
            "the tokenizer reads the text between pictures otherwise than Senna's code does; use the "
            "tokenizer.model that came with the checkpoint"
        )
