"""From the vision tower's patches to the decoder's visual tokens: the table of families.

Every map repeats what the model does between tower and decoder (packing, pooling, shuffling) on a few
channels instead of the hidden size: what a token has is the mean of what its patches have.
"""

from __future__ import annotations

import inspect
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers.vision_utils import get_vision_window_index

# (base model, patches, arguments of get_image_features or get_video_features) -> tokens.
# Patches are float32 [pictures, patches, channels], or [patches, channels] where a tower packs pictures
# of several sizes. Tokens are [tokens, channels], in the order in which the model scatters features
# into the prompts, and NaN where a token has no patch.
Map = Callable[[nn.Module, torch.Tensor, Mapping[str, Any]], torch.Tensor]
# With the same arguments: rows and columns of each picture's tokens, None if they are not known.
Grids = Callable[[nn.Module, torch.Tensor, Mapping[str, Any]], Sequence[tuple[int, int]] | None]


@dataclass(frozen=True)
class VisionFamily:
    """What the engine knows of one family's vision tower.

    image, video: the maps of its pictures and, if it takes any, videos.
    block: index of the tower's block whose attention is scored, from the model's configuration: the
        deepest one whose output the decoder receives. Negative if there is none.
    squares: whether `pixel_values` are [pictures, 3, height, width] with patches in row-major
        order, so that the border of a picture padded to a square can be seen in them.
    merges: whether patches may merge inside the tower: it runs once for all pictures, of one number
        of patches, and its maps take every visual token from one patch.
    """

    image: Map
    video: Map | None = None
    block: Callable[[Any], int] = lambda config: selected_block(config)
    squares: bool = False
    merges: bool = False


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


def as_configured(base: nn.Module, arguments: Mapping[str, Any]) -> bool:
    """Whether a call takes its features from the block that the configuration names."""
    name = "vision_feature_layer"
    return setting(base, arguments, name) == getattr(base.config, name, None)


def token_places(
    to_tokens: Map, base: nn.Module, shape: Sequence[int], arguments: Mapping[str, Any]
) -> torch.Tensor | None:
    """Where tokens lie: every map leaves the tokens of a picture row by row.

    Args:
        shape: [pictures, patches], or [patches] where a tower packs pictures of several sizes.

    Returns:
        float32 [tokens, 3] on the CPU: the picture's number within the call, row, column; NaN for
        tokens without a patch. The tiles of one picture, once joined, are one picture; its small
        version is another. None if the tokens do not fill their grids, as with a CLS token.
    """
    patches = torch.ones(*shape, 1)
    has_patch = ~to_tokens(base, patches, arguments)[:, 0].isnan()
    count = int(has_patch.sum())
    grids = GRIDS[to_tokens](base, patches, arguments) if to_tokens in GRIDS else None
    if grids is None and len(shape) == 2:
        grids = [(math.isqrt(count // shape[0]),) * 2] * shape[0]
    if grids is None or count != sum(rows * columns for rows, columns in grids):
        return None
    places = torch.full((len(has_patch), 3), float("nan"))
    places[has_patch] = torch.cat(
        [
            torch.cartesian_prod(torch.tensor([number]), torch.arange(rows), torch.arange(columns))
            for number, (rows, columns) in enumerate(grids)
        ]
    ).float()
    return places


def _each_patch(base, patches, arguments):
    return patches.flatten(0, -2)


def _any_resolution(base, patches, arguments):
    """Tiles are joined, unpadded and given a newline per row."""
    return torch.cat(_pack(base, patches, arguments))


def _pack(base, patches, arguments):
    """[tokens, channels] of each picture: its small version, then its joined tiles.

    LLaVA-OneVision also shrinks large pictures, and does not tile several of one prompt.
    """
    config, sizes = base.config, arguments["image_sizes"]
    count = sys.modules[type(base).__module__].image_size_to_num_patches
    tiles = [
        count(size, config.image_grid_pinpoints, config.vision_config.image_size) for size in sizes
    ]
    per_prompt = arguments.get("batch_num_images")
    if per_prompt is not None:
        alone = [n == 1 for n in per_prompt for _ in range(n)]
        tiles = [n if tiled else 1 for n, tiled in zip(tiles, alone, strict=True)]
    known = inspect.signature(base.pack_image_features).parameters
    options = {
        name: setting(base, arguments, name)
        for name in ("vision_feature_select_strategy", "vision_aspect_ratio")
        if name in known
    }
    newline = patches.new_full((patches.shape[-1],), float("nan"))
    packed, _ = base.pack_image_features(
        patches.split(tiles), sizes, image_newline=newline, **options
    )
    return list(packed)


def _joined_grids(base, patches, arguments):
    """The small version's grid, then that of the joined tiles, whose rows are as many as newlines."""
    grids, small = [], patches.shape[1]
    for tokens in _pack(base, patches, arguments):
        newlines = int(tokens[:, 0].isnan().sum())
        joined = len(tokens) - small - newlines
        grids += [(math.isqrt(small),) * 2, (newlines, joined // newlines)]
    return grids


def _onevision_video(base, patches, arguments):
    """Every frame is shrunk, and every video ends with a newline."""
    # Called pixel_values in older releases.
    pixels = arguments.get("pixel_values_videos", arguments.get("pixel_values"))
    frames = base.apply_pooling(patches)
    videos = frames.reshape(len(pixels), -1, frames.shape[-1])
    return F.pad(videos, (0, 0, 0, 1), value=float("nan")).flatten(0, 1)


def _next_video(base, patches, arguments):
    stride = base.config.spatial_pool_stride
    return _row_by_row(F.avg_pool2d(_as_square(patches), stride))


def _merge_neighbours(base, patches, arguments):
    """The tower sees the patches of one token next to each other."""
    merged = base.config.vision_config.spatial_merge_size**2
    return patches.reshape(-1, merged, patches.shape[-1]).mean(dim=1)


def _merge_windows(base, patches, arguments):
    """As `_merge_neighbours`, but tokens are sorted by attention windows inside the tower."""
    vision = base.config.vision_config
    order, _ = get_vision_window_index(
        _frames(arguments), vision.spatial_merge_size, vision.window_size, vision.patch_size
    )
    tokens = _merge_neighbours(base, patches, arguments)
    return tokens[order.argsort().to(tokens.device)]


def _frame_grids(base, patches, arguments):
    """Every frame of a video is a picture."""
    merge = base.config.vision_config.spatial_merge_size
    return [
        (rows // merge, columns // merge)
        for frames, rows, columns in _frames(arguments).tolist()
        for _ in range(frames)
    ]


def _frames(arguments):
    return arguments.get("image_grid_thw", arguments.get("video_grid_thw"))


def _shuffle_internvl(base, patches, arguments):
    square = _as_square(patches).movedim(1, -1)
    shuffled = base.pixel_shuffle(square, scale_factor=base.config.downsample_ratio)
    return _mean_of_shuffled(shuffled, patches)


def _shuffle_idefics(base, patches, arguments):
    connector = base.connector
    return _mean_of_shuffled(connector.pixel_shuffle(patches, connector.scale_factor), patches)


def _shuffle_aya(base, patches, arguments):
    return _mean_of_shuffled(base.multi_modal_projector.pixel_shuffle(patches), patches)


def _mean_of_shuffled(shuffled, patches):
    """A pixel shuffle puts the channels of a token's patches behind each other."""
    return shuffled.reshape(-1, shuffled.shape[-1] // patches.shape[-1], patches.shape[-1]).mean(1)


def _pool_gemma(base, patches, arguments):
    return _row_by_row(base.multi_modal_projector.avg_pool(_as_square(patches)))


def _merge_grids(base, patches, arguments):
    """Mistral 3 merges the patches of every picture on the picture's own grid."""
    merge = base.config.spatial_merge_size
    grids = _sized_grids(arguments, base.config.vision_config.patch_size)
    pictures = patches.flatten(0, -2).split([rows * columns for rows, columns in grids])
    maps = [
        p.unflatten(0, (1, *grid)).movedim(-1, 1) for p, grid in zip(pictures, grids, strict=True)
    ]
    return torch.cat([_row_by_row(F.avg_pool2d(channels, merge)) for channels in maps])


def _picture_grids(base, patches, arguments):
    """Pixtral's tower takes pictures of any size, in Mistral 3 and in LLaVA."""
    merge = getattr(base.config, "spatial_merge_size", 1)
    return _sized_grids(arguments, base.config.vision_config.patch_size * merge)


def _sized_grids(arguments, side):
    sizes = arguments.get("image_sizes")
    if sizes is None:
        return None
    return [(height // side, width // side) for height, width in torch.as_tensor(sizes).tolist()]


def _as_square(patches: torch.Tensor) -> torch.Tensor:
    """[pictures, patches, channels] -> [pictures, channels, side, side]."""
    return patches.unflatten(1, (round(patches.shape[1] ** 0.5), -1)).movedim(-1, 1)


def _row_by_row(grids: torch.Tensor) -> torch.Tensor:
    """[pictures, channels, rows, columns] -> [tokens, channels]."""
    return grids.movedim(1, -1).flatten(0, 2)


# Of the maps that may leave pictures whose tokens are no square.
GRIDS: dict[Map, Grids] = {
    _each_patch: _picture_grids,
    _any_resolution: _joined_grids,
    _merge_neighbours: _frame_grids,
    _merge_windows: _frame_grids,
    _merge_grids: _picture_grids,
}

FAMILIES: dict[str, VisionFamily] = {
    "llava": VisionFamily(_each_patch, squares=True, merges=True),
    "llava_next": VisionFamily(_any_resolution, merges=True),
    "llava_next_video": VisionFamily(_any_resolution, _next_video),
    "llava_onevision": VisionFamily(_any_resolution, _onevision_video),
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
    "paligemma": VisionFamily(_each_patch, squares=True, merges=True),
    "mistral3": VisionFamily(_merge_grids),
    "aya_vision": VisionFamily(_shuffle_aya),
}
