"""From the vision tower's patches to the decoder's visual tokens: the table of families.

Every map repeats what the model does between tower and decoder (packing, pooling, shuffling) on one
channel instead of the hidden size: a token's score is the mean of the scores of its patches.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers.vision_utils import get_vision_window_index

# (base model, patch scores, arguments of get_image_features or get_video_features) -> token scores.
# Patch scores are float32 [pictures, patches], flat where a tower packs pictures of several sizes.
# Token scores are flat, in the order in which the model scatters features into the prompts, and NaN
# where a token has no patch.
Map = Callable[[nn.Module, torch.Tensor, Mapping[str, Any]], torch.Tensor]


@dataclass(frozen=True)
class VisionFamily:
    """What the engine knows of one family's vision tower.

    image, video: the maps of its pictures and, if it takes any, videos.
    block: index of the tower's block whose attention is scored, from the model's configuration: the
        deepest one whose output the decoder receives. Negative if there is none.
    squares: whether `pixel_values` are [pictures, 3, height, width] with patches in row-major
        order, so that the border of a picture padded to a square can be seen in them.
    """

    image: Map
    video: Map | None = None
    block: Callable[[Any], int] = lambda config: selected_block(config)
    squares: bool = False


def selected_block(config: Any) -> int:
    """The deepest block that `vision_feature_layer` selects; without such a setting, the last."""
    states = (tower_depth(config) or 0) + 1
    selected = getattr(config, "vision_feature_layer", -1)
    layers = [selected] if isinstance(selected, int) else selected
    # hidden_states[0] is the embedding, so hidden_states[i] leaves block i - 1.
    return max(layer % states for layer in layers) - 1


def tower_depth(config: Any) -> int | None:
    """Blocks of the vision tower, if its configuration says so."""
    vision = getattr(config, "vision_config", None)
    return getattr(vision, "num_hidden_layers", None) or getattr(vision, "depth", None)


def setting(base: nn.Module, arguments: Mapping[str, Any], name: str) -> Any:
    """An argument of the call, or the configuration's value where it was left out."""
    given = arguments.get(name)
    return getattr(base.config, name, None) if given is None else given


def _each_patch(base, patches, arguments):
    return patches.flatten()


def _any_resolution(base, patches, arguments):
    """Tiles are joined, unpadded and given a newline per row."""
    strategy = setting(base, arguments, "vision_feature_select_strategy")
    return _pack(base, patches, arguments, vision_feature_select_strategy=strategy)


def _onevision_image(base, patches, arguments):
    """As `_any_resolution`, but large pictures are shrunk, and several pictures are not tiled."""
    ratio = setting(base, arguments, "vision_aspect_ratio")
    return _pack(base, patches, arguments, vision_aspect_ratio=ratio)


def _pack(base, patches, arguments, **options):
    config, sizes = base.config, arguments["image_sizes"]
    count = sys.modules[type(base).__module__].image_size_to_num_patches
    tiles = [
        count(size, config.image_grid_pinpoints, config.vision_config.image_size) for size in sizes
    ]
    per_prompt = arguments.get("batch_num_images")
    if per_prompt is not None:
        alone = [n == 1 for n in per_prompt for _ in range(n)]
        tiles = [n if tiled else 1 for n, tiled in zip(tiles, alone, strict=True)]
    newline = torch.full((1,), float("nan"), device=patches.device)
    packed, _ = base.pack_image_features(
        patches[..., None].split(tiles), sizes, image_newline=newline, **options
    )
    return torch.cat(list(packed)).flatten()


def _onevision_video(base, patches, arguments):
    """Every frame is shrunk, and every video ends with a newline."""
    # Called pixel_values in older releases.
    pixels = arguments.get("pixel_values_videos", arguments.get("pixel_values"))
    frames = base.apply_pooling(patches[..., None])
    return F.pad(frames.reshape(len(pixels), -1), (0, 1), value=float("nan")).flatten()


def _next_video(base, patches, arguments):
    stride = base.config.spatial_pool_stride
    return F.avg_pool2d(_as_square(patches), stride).flatten()


def _merge_neighbours(base, patches, arguments):
    """The tower sees the patches of one token next to each other."""
    merged = base.config.vision_config.spatial_merge_size**2
    return patches.reshape(-1, merged).mean(dim=1)


def _merge_windows(base, patches, arguments):
    """As `_merge_neighbours`, but tokens are sorted by attention windows inside the tower."""
    vision = base.config.vision_config
    grid = arguments.get("image_grid_thw", arguments.get("video_grid_thw"))
    order, _ = get_vision_window_index(
        grid, vision.spatial_merge_size, vision.window_size, vision.patch_size
    )
    tokens = _merge_neighbours(base, patches, arguments)
    return tokens[order.argsort().to(tokens.device)]


def _shuffle_internvl(base, patches, arguments):
    square = _as_square(patches)[:, 0, :, :, None]
    return base.pixel_shuffle(square, scale_factor=base.config.downsample_ratio).mean(-1).flatten()


def _shuffle_idefics(base, patches, arguments):
    connector = base.connector
    return connector.pixel_shuffle(patches[..., None], connector.scale_factor).mean(-1).flatten()


def _shuffle_aya(base, patches, arguments):
    return base.multi_modal_projector.pixel_shuffle(patches[..., None]).mean(-1).flatten()


def _pool_gemma(base, patches, arguments):
    return base.multi_modal_projector.avg_pool(_as_square(patches)).flatten()


def _merge_grids(base, patches, arguments):
    """Mistral 3 merges the patches of every picture on the picture's own grid."""
    side, merge = base.config.vision_config.patch_size, base.config.spatial_merge_size
    grids = [
        (int(height) // side, int(width) // side) for height, width in arguments["image_sizes"]
    ]
    pictures = patches.flatten().split([rows * columns for rows, columns in grids])
    maps = [p.view(1, *grid) for p, grid in zip(pictures, grids, strict=True)]
    return torch.cat([F.avg_pool2d(scores, merge).flatten() for scores in maps])


def _as_square(patches: torch.Tensor) -> torch.Tensor:
    """[pictures, patches] -> [pictures, 1, side, side]."""
    return patches.unflatten(1, (1, round(patches.shape[1] ** 0.5), -1))


FAMILIES: dict[str, VisionFamily] = {
    "llava": VisionFamily(_each_patch, squares=True),
    "llava_next": VisionFamily(_any_resolution),
    "llava_next_video": VisionFamily(_any_resolution, _next_video),
    "llava_onevision": VisionFamily(_onevision_image, _onevision_video),
    "qwen2_vl": VisionFamily(_merge_neighbours, _merge_neighbours),
    "qwen2_5_vl": VisionFamily(
        _merge_windows,
        _merge_windows,
        # The blocks between see single windows only.
        block=lambda config: max(config.vision_config.fullatt_block_indexes),
    ),
    "qwen3_vl": VisionFamily(_merge_neighbours, _merge_neighbours),
    "glm4v": VisionFamily(_merge_neighbours, _merge_neighbours),
    "internvl": VisionFamily(_shuffle_internvl, squares=True),
    "idefics3": VisionFamily(_shuffle_idefics),
    "smolvlm": VisionFamily(_shuffle_idefics),
    "gemma3": VisionFamily(_pool_gemma, squares=True),
    "paligemma": VisionFamily(_each_patch, squares=True),
    "mistral3": VisionFamily(_merge_grids),
    "aya_vision": VisionFamily(_shuffle_aya),
}
