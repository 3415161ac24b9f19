"""What is measured: a model, and prompts of any batch size made directly, without a processor."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from PIL.Image import Image

    from ..loading import Loaded

Tensors = dict[str, torch.Tensor]

# Ids of ordinary words in every vocabulary of the table.
WORDS = (10, 1000)


@dataclass(frozen=True)
class Subject:
    """A model in eval mode; `prompts(batch)` gives the arguments of its forward."""

    name: str
    model: Any
    prompts: Callable[[int], Tensors]


@dataclass(frozen=True)
class Configuration:
    """A model that is built with random weights.

    config: its transformers configuration.
    picture: random pixels of one picture, as the model takes them.
    visual_tokens: placeholders that such a picture needs in the prompt.
    """

    config: Callable[[], Any]
    picture: Callable[[torch.Generator], Tensors]
    visual_tokens: int


def build(name: str, text: int, images: int, device: torch.device, dtype: torch.dtype) -> Subject:
    """A model of `CONFIGURATIONS` with random weights of a fixed seed.

    Args:
        text: tokens of a prompt that are not visual; half of them stand before the pictures.
        images: pictures of a prompt.

    Raises:
        ValueError: such a prompt is longer than the model takes.
    """
    from transformers import AutoModelForImageTextToText

    row = CONFIGURATIONS[name]
    _check_length(name, row.config(), text + images * row.visual_tokens)
    with torch.random.fork_rng(), torch.device(device):
        torch.manual_seed(0)
        model: Any = AutoModelForImageTextToText.from_config(row.config(), dtype=dtype)

    def prompts(batch: int) -> Tensors:
        made = random_prompts(row, model.config, batch, text, images)
        return {
            key: value.to(device, dtype if value.is_floating_point() else None)
            for key, value in made.items()
        }

    return Subject(name, model.eval(), prompts)


def from_checkpoint(
    loaded: Loaded, text: int, picture: Image | None = None, question: str | None = None
) -> Subject:
    """A checkpoint's prompts, by its processor; those of a batch ask the same question.

    Args:
        text: about how many tokens the question has, if none is given.
        picture: of all prompts; None is 336 x 336 random pixels, others for each prompt.

    Raises:
        ValueError: such a question is longer than the model takes.
    """
    import PIL.Image

    from ..loading import prepare

    if question is None:
        _check_length(loaded.name, loaded.model.config, text)

    def prompts(batch: int) -> Tensors:
        generator = torch.Generator().manual_seed(0)
        shown = PIL.Image.new("RGB", (336, 336)) if picture is None else picture
        single = prepare(loaded, shown, "what " * text if question is None else question)
        _check_length(loaded.name, loaded.model.config, single["input_ids"].shape[1])
        whole = {key: torch.cat([value] * batch) for key, value in single.items()}
        if picture is None:
            noise = torch.randn(whole["pixel_values"].shape, generator=generator)
            whole["pixel_values"] = noise.to(whole["pixel_values"])
        return whole

    return Subject(loaded.name, loaded.model, prompts)


def _check_length(name: str, config: Any, tokens: int) -> None:
    """Raise ValueError where a prompt is longer than the model takes."""
    most = getattr(config.get_text_config(), "max_position_embeddings", None)
    if most is not None and tokens > most:
        raise ValueError(
            f"a prompt of {tokens} tokens or more is longer than the {most} that {name} takes; "
            "give a smaller --text, a shorter --question or fewer --images"
        )


def random_prompts(
    row: Configuration, config: Any, batch: int, text: int, images: int, seed: int = 0
) -> Tensors:
    """Arguments of the model's forward: random words around random pictures, one length for all."""
    generator = torch.Generator().manual_seed(seed)
    pictures = [row.picture(generator) for _ in range(batch * images)]
    words = torch.randint(*WORDS, (batch, text), generator=generator)
    placeholders = torch.full((batch, images * row.visual_tokens), config.image_token_id)
    before = text // 2
    ids = torch.cat([words[:, :before], placeholders, words[:, before:]], dim=1)
    made = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if "image_grid_thw" in pictures[0]:
        made["mm_token_type_ids"] = (ids == config.image_token_id).long()
    return made | {key: torch.cat([picture[key] for picture in pictures]) for key in pictures[0]}


def clip(hidden: int, layers: int, heads: int) -> dict[str, Any]:
    """Configuration of a CLIP tower for pictures of `square`: 24 x 24 patches."""
    return {
        "model_type": "clip_vision_model",
        "hidden_size": hidden,
        "intermediate_size": 4 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "image_size": 336,
        "patch_size": 14,
    }


def llava(name: str, vision: dict[str, Any], vocabulary: int = 32064, **text: Any) -> Any:
    """Configuration of that class, with a Llama decoder."""
    import transformers

    llama = {"model_type": "llama", "vocab_size": vocabulary, "max_position_embeddings": 8192}
    return getattr(transformers, name)(
        text_config={**llama, **text},
        vision_config=vision,
        image_token_index=vocabulary - 64,
    )


def _small(heads: int, intermediate: int) -> Any:
    """12 layers, with heads of 64."""
    return llava(
        "LlavaConfig",
        clip(64, 2, 2),
        # In proportion to the width, as in a 7B model, so that the logits do not dominate.
        vocabulary=8 * 64 * heads,
        hidden_size=64 * heads,
        intermediate_size=intermediate,
        num_hidden_layers=12,
        num_attention_heads=heads,
        num_key_value_heads=heads,
    )


def _qwen2_5_vl() -> Any:
    import transformers

    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}
    text = {
        "model_type": "qwen2_5_vl_text",
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "rope_parameters": rope,
    }
    return transformers.Qwen2_5_VLConfig(text_config=text)


def square(generator: torch.Generator) -> Tensors:
    """Random pixels of one picture."""
    return {"pixel_values": torch.randn(1, 3, 336, 336, generator=generator)}


def _tiles(generator: torch.Generator) -> Tensors:
    pixels = torch.randn(1, 5, 3, 336, 336, generator=generator)
    return {"pixel_values": pixels, "image_sizes": torch.tensor([[672, 672]])}


def _patches(generator: torch.Generator) -> Tensors:
    side = 72
    pixels = torch.randn(side * side, 3 * 2 * 14 * 14, generator=generator)
    return {"pixel_values": pixels, "image_grid_thw": torch.tensor([[1, side, side]])}


CONFIGURATIONS = {
    "small": Configuration(lambda: _small(8, 1376), square, 24 * 24),
    # So narrow that a step of decoding is nearly all Python: what hooks cost by themselves.
    "narrow": Configuration(lambda: _small(2, 64), square, 24 * 24),
    "llava-1.5-7b": Configuration(
        lambda: llava("LlavaConfig", clip(1024, 24, 16)), square, 24 * 24
    ),
    # Four tiles and the whole picture, 2880 patches, and the end of each of the tiles' 48 rows.
    "llava-next-7b": Configuration(
        lambda: llava("LlavaNextConfig", clip(1024, 24, 16)), _tiles, 2880 + 48
    ),
    "qwen2.5-vl-7b": Configuration(_qwen2_5_vl, _patches, 36 * 36),
}
"""Models by name; 7B ones need a GPU."""
