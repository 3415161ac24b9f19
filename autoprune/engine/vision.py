"""Scores of visual tokens from the vision tower, in the order in which the decoder sees the tokens.

The tower's attention is tapped in the block whose output the decoder receives. With a CLS token the score
is the CLS row; without one it is the attention a patch receives from all patches. The model's own packing
then carries the scores from patches to visual tokens.
"""

from __future__ import annotations

import inspect
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
from torch import nn

from .tap import row_attention

ROWS_AT_ONCE = 256


@dataclass
class VisionScores:
    """Scores of all visual tokens of one modality, flat, in the order in which the model scatters them.

    scores: float32 [tokens], NaN for tokens without a patch. padding: bool [tokens] or None.
    """

    scores: torch.Tensor
    padding: torch.Tensor | None

    def per_prompt(self, counts: list[int]) -> tuple[list[torch.Tensor], list[torch.Tensor] | None]:
        """Split by prompt, repeating each prompt's scores where generation expanded the batch."""
        total, have = sum(counts), self.scores.shape[0]
        if not have or total % have:
            return [], None
        repeats = total // have
        own = counts[::repeats]
        if repeats > 1 and [n for n in own for _ in range(repeats)] != counts:
            return [], None
        scores = [part for part in self.scores.split(own) for _ in range(repeats)]
        if self.padding is None:
            return scores, None
        return scores, [part for part in self.padding.split(own) for _ in range(repeats)]


Mapper = Callable[[nn.Module, torch.Tensor, dict[str, Any]], torch.Tensor]


def _identity(base: nn.Module, patches: torch.Tensor, arguments: dict[str, Any]) -> torch.Tensor:
    return patches.flatten()


def _any_resolution(base: nn.Module, patches: torch.Tensor, arguments: dict[str, Any]) -> torch.Tensor:
    """LLaVA-NeXT: crops are tiled, unpadded and given a newline per row; newlines become NaN."""
    crops_of = sys.modules[type(base).__module__].image_size_to_num_patches
    config, sizes = base.config, arguments["image_sizes"]
    crops = [
        crops_of(size, config.image_grid_pinpoints, config.vision_config.image_size) for size in sizes
    ]
    packed, _ = base.pack_image_features(
        patches[..., None].split(crops),
        sizes,
        vision_feature_select_strategy=_setting(base, arguments, "vision_feature_select_strategy"),
        image_newline=torch.full((1,), float("nan"), device=patches.device),
    )
    return torch.cat(list(packed)).flatten()


MAPPERS: dict[str, Mapper] = {"llava": _identity, "llava_next": _any_resolution}


def _setting(base: nn.Module, arguments: dict[str, Any], name: str) -> Any:
    given = arguments.get(name)
    return given if given is not None else getattr(base.config, name, None)


class VisionTap:
    """Collects scores while a model computes its image features.

    It wraps `get_image_features` on the instance (generation calls it ahead of the forward, a plain
    forward inside it) and is undone by `remove`. What was collected waits, per thread, for `take`.
    """

    def __init__(self, base: nn.Module, vision: nn.Module):
        self.base, self.vision = base, vision
        self.mapper = MAPPERS.get(base.config.model_type)
        self.attention = self._attention() if self.mapper else None
        self._local = threading.local()

    @property
    def available(self) -> bool:
        return self.attention is not None

    def install(self) -> None:
        original = self.base.get_image_features
        signature = inspect.signature(original)

        @wraps(original)
        def get_image_features(*args, **kwargs):
            arguments = signature.bind(*args, **kwargs).arguments
            self._local.patches = []
            try:
                features = original(*args, **kwargs)
                self._local.ready = self._collect(arguments)
            finally:
                self._local.patches = None
            return features

        self.base.get_image_features = get_image_features

    def remove(self) -> None:
        self.base.__dict__.pop("get_image_features", None)
        self._local = threading.local()

    def take(self) -> VisionScores | None:
        """The scores collected in this thread since the last call."""
        ready = getattr(self._local, "ready", None)
        self._local.ready = None
        return ready

    def observe(self, module, query, key, attention_mask, scaling=None, **kwargs) -> None:
        """Called with the tower's query and key, [images, heads, tokens, head dim]."""
        patches = getattr(self._local, "patches", None)
        if patches is None:
            return
        if self._has_cls():
            cls = row_attention(query[:, :, :1], key, scaling)
            patches.append(cls.mean(dim=1)[:, 0, 1:])
            return
        received = 0.0
        for rows in query.split(ROWS_AT_ONCE, dim=2):
            received = received + row_attention(rows, key, scaling).mean(dim=1).sum(dim=1)
        patches.append(received / query.shape[2])

    def _collect(self, arguments: dict[str, Any]) -> VisionScores | None:
        patches = self._local.patches
        if not patches:
            return None
        scores = torch.cat(patches)
        padding = padded_patches(arguments.get("pixel_values"), scores.shape)
        mapped = self.mapper(self.base, scores, arguments)
        if padding is not None:
            padding = self.mapper(self.base, padding.float(), arguments) == 1
        return VisionScores(mapped, padding)

    def _has_cls(self) -> bool:
        return getattr(self.base.config, "vision_feature_select_strategy", None) == "default"

    def _attention(self) -> nn.Module | None:
        config = self.base.config
        depth = getattr(config.vision_config, "num_hidden_layers", None)
        stacks = [m for m in self.vision.modules() if isinstance(m, nn.ModuleList) and len(m) == depth]
        if not stacks:
            return None
        layer = getattr(config, "vision_feature_layer", -1)
        if not isinstance(layer, int):
            layer = max(layer, key=lambda i: i % (depth + 1))
        # hidden_states[0] is the embedding, so hidden_states[i] leaves block i - 1.
        block = stacks[0][(layer % (depth + 1)) - 1]
        return next((m for m in block.modules() if hasattr(m, "is_causal")), None)


def padded_patches(pixels: Any, shape: torch.Size) -> torch.Tensor | None:
    """Which patches lie wholly in the constant border that pads a picture to a square.

    Args:
        pixels: [images, 3, height, width].
        shape: [images, patches], patches in row-major order of a square grid.

    Returns:
        bool [images, patches]; None if the pixels do not fit that description.
    """
    if not isinstance(pixels, torch.Tensor) or pixels.ndim != 4:
        return None
    side = round(shape[1] ** 0.5)
    height, width = pixels.shape[-2:]
    if pixels.shape[0] != shape[0] or side * side != shape[1] or height % side or width % side:
        return None
    rows = _border(pixels).view(len(pixels), side, height // side).all(dim=-1)
    columns = _border(pixels.transpose(-1, -2)).view(len(pixels), side, width // side).all(dim=-1)
    return (rows[:, :, None] | columns[:, None, :]).flatten(1)


def _border(pixels: torch.Tensor) -> torch.Tensor:
    """bool [images, height]: rows of one constant colour, unbroken from the top or bottom edge."""
    flat = (pixels.amax(dim=-1) == pixels.amin(dim=-1)).all(dim=1)
    colour = pixels[..., 0]
    top = flat & (colour == colour[:, :, :1]).all(dim=1)
    bottom = flat & (colour == colour[:, :, -1:]).all(dim=1)
    top = top.to(torch.int8).cummin(dim=1).values.bool()
    bottom = bottom.flip(1).to(torch.int8).cummin(dim=1).values.flip(1).bool()
    return top | bottom
