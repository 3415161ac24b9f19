"""Maps of towers that take pictures of several sizes, whose patches stand in one row behind each other.

What such a map does is told in `maps.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.vision_utils import get_vision_window_index

from ..locate import Model

# Those of get_image_features or get_video_features.
Arguments = Mapping[str, Any]
# From patches to tokens. Patches are float32 [pictures, patches, channels], or [patches, channels] where a
# tower packs pictures of several sizes. Tokens are [tokens, channels], in the order in which the model
# scatters features into the prompts, and NaN where a token has no patch.
Map = Callable[[Model, Tensor, Arguments], Tensor]
# With the same arguments: rows and columns of each picture's tokens, None if they are not known.
Grids = list[tuple[int, int]] | None


def merge_neighbours(base: Model, patches: Tensor, arguments: Arguments) -> Tensor:
    """The tower sees the patches of one token next to each other."""
    merged = base.config.vision_config.spatial_merge_size**2
    return patches.reshape(-1, merged, patches.shape[-1]).mean(dim=1)


def merge_windows(base: Model, patches: Tensor, arguments: Arguments) -> Tensor:
    """As `merge_neighbours`, but tokens are sorted by attention windows inside the tower."""
    vision = base.config.vision_config
    order, _ = get_vision_window_index(
        _frames(arguments), vision.spatial_merge_size, vision.window_size, vision.patch_size
    )
    tokens = merge_neighbours(base, patches, arguments)
    return tokens[order.argsort().to(tokens.device)]


def frame_grids(base: Model, patches: Tensor, arguments: Arguments) -> Grids:
    """Every frame of a video is a picture."""
    frames = _frames(arguments).tolist()
    merges = _sizes_of(arguments) or [_square_side(base)] * len(frames)
    return [
        (rows // merge, columns // merge)
        for (count, rows, columns), merge in zip(frames, merges, strict=True)
        for _ in range(count)
    ]


def _frames(arguments: Arguments) -> Tensor:
    return arguments.get("image_grid_thw", arguments.get("video_grid_thw"))


def _sizes_of(arguments: Arguments) -> list[int]:
    """Side of the square of patches that makes a token, of each picture; empty where a call says nothing."""
    sizes = arguments.get("image_merge_sizes", arguments.get("video_merge_sizes"))
    return [] if sizes is None else sizes.tolist()


def _square_side(base: Model) -> int:
    vision = base.config.vision_config
    return getattr(vision, "spatial_merge_size", None) or vision.merge_kernel_size[0]


def merge_sized(base: Model, patches: Tensor, arguments: Arguments) -> Tensor:
    """As `merge_neighbours`, by a number of patches that each picture of a call says itself."""
    sizes = _sizes_of(arguments)
    pictures = patches.flatten(0, -2).split(_frames(arguments).prod(dim=-1).tolist())
    merged = [
        picture.unflatten(0, (-1, size**2)).mean(dim=1)
        for picture, size in zip(pictures, sizes, strict=True)
    ]
    return torch.cat(merged)


def merge_rows(base: Model, patches: Tensor, arguments: Arguments) -> Tensor:
    """The tower sees a picture row by row; a token is made of the patches of a square."""
    merge = _square_side(base)
    grids = _frames(arguments).tolist()
    pictures = patches.flatten(0, -2).split([math.prod(grid) for grid in grids])
    merged = [
        picture.view(t, rows // merge, merge, columns // merge, merge, -1).mean(dim=(2, 4))
        for picture, (t, rows, columns) in zip(pictures, grids, strict=True)
    ]
    return torch.cat([tokens.flatten(0, 2) for tokens in merged])


def merge_pooled(base: Model, patches: Tensor, arguments: Arguments) -> Tensor:
    """Molmo 2 says itself which patches make a token: [tokens, patches of each], -1 where there are fewer."""
    index = arguments["image_token_pooling"]
    there = (index >= 0)[..., None].to(patches)
    chosen = patches.flatten(0, -2)[index.clamp(min=0)]
    return (chosen * there).sum(dim=1) / there.sum(dim=1)


def merge_padded(base: Model, patches: Tensor, arguments: Arguments) -> Tensor:
    """As `merge_rows`, of pictures that are padded to one number of patches."""
    merge = base.config.downsample_factor
    merged = [
        picture[: rows * columns]
        .view(rows // merge, merge, columns // merge, merge, -1)
        .mean(dim=(1, 3))
        .flatten(0, 1)
        for picture, (rows, columns) in zip(
            patches, arguments["spatial_shapes"].tolist(), strict=True
        )
    ]
    return torch.cat(merged)


def padded_grids(base: Model, patches: Tensor, arguments: Arguments) -> Grids:
    merge = base.config.downsample_factor
    return [
        (rows // merge, columns // merge) for rows, columns in arguments["spatial_shapes"].tolist()
    ]


def merge_placed(base: Model, patches: Tensor, arguments: Arguments) -> Tensor:
    """Gemma 4 says of each patch where it is, and pads pictures; a token is made of the patches of a square."""
    merged, side = [], base.config.vision_config.pooling_kernel_size
    for picture, places in zip(patches, _places(arguments), strict=True):
        columns, rows = places[(places >= 0).all(dim=-1)].unbind(dim=-1)
        token = rows // side * ((columns.max() + 1) // side) + columns // side
        tokens = picture.new_zeros(len(token) // side**2, picture.shape[-1])
        tokens.index_add_(0, token.to(picture.device), picture[: len(token)])
        merged.append(tokens / side**2)
    return torch.cat(merged)


def placed_grids(base: Model, patches: Tensor, arguments: Arguments) -> Grids:
    side = base.config.vision_config.pooling_kernel_size
    most = [(places.amax(dim=0) + 1).tolist() for places in _places(arguments)]
    return [(rows // side, columns // side) for columns, rows in most]


def _places(arguments: Arguments) -> Tensor:
    """LongTensor [pictures, patches, 2], the (x, y) of each patch; -1 for padding, which comes last."""
    places = arguments.get("image_position_ids")
    places = arguments["video_position_ids"] if places is None else places
    # Until transformers 5.23 the frames of each video stood together.
    return places.flatten(0, -3)


def pooled_grids(base: Model, patches: Tensor, arguments: Arguments) -> Grids:
    """Of each picture the small version, then its tiles."""
    return [
        grid
        for rows, columns, tiled_rows, tiled_columns in arguments["image_grids"].tolist()
        for grid in ((rows, columns), (tiled_rows, tiled_columns))
    ]


def merge_grids(base: Model, patches: Tensor, arguments: Arguments) -> Tensor:
    """Mistral 3 merges the patches of every picture on the picture's own grid."""
    grids = _sized_grids(arguments, base.config.vision_config.patch_size) or []
    pictures = patches.flatten(0, -2).split([rows * columns for rows, columns in grids])
    merged = [
        F.avg_pool2d(
            picture.unflatten(0, (1, *grid)).movedim(-1, 1), base.config.spatial_merge_size
        )
        for picture, grid in zip(pictures, grids, strict=True)
    ]
    return torch.cat([channels.movedim(1, -1).flatten(0, 2) for channels in merged])


def picture_grids(base: Model, patches: Tensor, arguments: Arguments) -> Grids:
    """Pixtral's tower takes pictures of any size, in Mistral 3 and in LLaVA."""
    merge = getattr(base.config, "spatial_merge_size", 1)
    return _sized_grids(arguments, base.config.vision_config.patch_size * merge)


def _sized_grids(arguments: Arguments, side: int) -> Grids:
    sizes = arguments.get("image_sizes")
    if sizes is None:
        return None
    return [(height // side, width // side) for height, width in torch.as_tensor(sizes).tolist()]
