"""From the vision tower's patches to the decoder's visual tokens: the table of how towers lay out patches.

Every map repeats what the model does between tower and decoder (packing, pooling, shuffling) on a few
channels instead of the hidden size: what a token has is the mean of what its patches have.
"""

from __future__ import annotations

import inspect
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..locate import Model
from .packed_maps import (
    Arguments,
    Grids,
    Map,
    frame_grids,
    merge_grids,
    merge_neighbours,
    merge_padded,
    merge_placed,
    merge_pooled,
    merge_rows,
    merge_sized,
    merge_windows,
    padded_grids,
    picture_grids,
    placed_grids,
    pooled_grids,
)


@dataclass(frozen=True)
class PatchLayout:
    """How the vision tower of one family lays out its patches.

    image, video: the maps of its pictures and, if it takes any, videos.
    block: index of the tower's block whose attention is scored, from the model's configuration: the
        deepest one whose output the decoder receives. Negative if there is none.
    squares: whether `pixel_values` are [pictures, 3, height, width] with patches in row-major
        order, so that the border of a picture padded to a square can be seen in them.
    cls_last: whether the tower's CLS token stands behind the patches.
    merges: whether patches may merge inside the tower: it runs once for all pictures, of one number
        of patches, and its maps take every visual token from one patch.
    """

    image: Map
    video: Map | None = None
    block: Callable[[Any], int] = lambda config: selected_block(config)
    squares: bool = False
    cls_last: bool = False
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


def setting(base: Model, arguments: Arguments, name: str) -> Any:
    """An argument of the call, or the configuration's value where it was left out."""
    given = arguments.get(name)
    return getattr(base.config, name, None) if given is None else given


def as_configured(base: Model, arguments: Arguments) -> bool:
    """Whether a call takes its features from the block that the configuration names."""
    name = "vision_feature_layer"
    return setting(base, arguments, name) == getattr(base.config, name, None)


def token_places(
    to_tokens: Map, base: Model, shape: Sequence[int], arguments: Arguments
) -> Tensor | None:
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
    grids = _GRIDS[to_tokens](base, patches, arguments) if to_tokens in _GRIDS else None
    if grids is None and len(shape) == 2:
        grids = [(math.isqrt(count // shape[0]),) * 2] * shape[0]
    if grids is None or count != sum(rows * columns for rows, columns in grids):
        return None
    cells = [
        (number, row, column)
        for number, (rows, columns) in enumerate(grids)
        for row in range(rows)
        for column in range(columns)
    ]
    places = torch.full((len(has_patch), 3), float("nan"))
    places[has_patch] = torch.tensor(cells, dtype=torch.float32)
    return places


def _each_patch(base: Model, patches: Tensor, arguments: Arguments) -> Tensor:
    return patches.flatten(0, -2)


def _any_resolution(base: Model, patches: Tensor, arguments: Arguments) -> Tensor:
    """Tiles are joined, unpadded and given a newline per row."""
    return torch.cat(_pack(base, patches, arguments))


def _pack(base: Model, patches: Tensor, arguments: Arguments) -> list[Tensor]:
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


def _joined_grids(base: Model, patches: Tensor, arguments: Arguments) -> Grids:
    """The small version's grid, then that of the joined tiles, whose rows are as many as newlines."""
    grids, small = [], patches.shape[1]
    for tokens in _pack(base, patches, arguments):
        newlines = int(tokens[:, 0].isnan().sum())
        joined = len(tokens) - small - newlines
        grids += [(math.isqrt(small), math.isqrt(small)), (newlines, joined // newlines)]
    return grids


def _onevision_video(base: Model, patches: Tensor, arguments: Arguments) -> Tensor:
    """Every frame is shrunk, and every video ends with a newline."""
    # Called pixel_values in older releases.
    pixels = arguments.get("pixel_values_videos", arguments.get("pixel_values"))
    frames = base.apply_pooling(patches)
    videos = frames.reshape(len(pixels), -1, frames.shape[-1])
    return F.pad(videos, (0, 0, 0, 1), value=float("nan")).flatten(0, 1)


def _next_video(base: Model, patches: Tensor, arguments: Arguments) -> Tensor:
    stride = base.config.spatial_pool_stride
    return _row_by_row(F.avg_pool2d(_as_square(patches), stride))


def _shuffle_internvl(base: Model, patches: Tensor, arguments: Arguments) -> Tensor:
    square = _as_square(patches).movedim(1, -1)
    shuffled = base.pixel_shuffle(square, scale_factor=base.config.downsample_ratio)
    return _mean_of_shuffled(shuffled, patches)


def _shuffle_idefics(base: Model, patches: Tensor, arguments: Arguments) -> Tensor:
    connector = base.connector
    return _mean_of_shuffled(connector.pixel_shuffle(patches, connector.scale_factor), patches)


def _shuffle_projected(base: Model, patches: Tensor, arguments: Arguments) -> Tensor:
    return _mean_of_shuffled(base.multi_modal_projector.pixel_shuffle(patches), patches)


def _shuffle_llama(base: Model, patches: Tensor, arguments: Arguments) -> Tensor:
    shuffle = sys.modules[type(base).__module__].pixel_shuffle
    return _mean_of_shuffled(
        shuffle(patches, base.config.vision_config.pixel_shuffle_ratio), patches
    )


def _mean_of_shuffled(shuffled: Tensor, patches: Tensor) -> Tensor:
    """A pixel shuffle puts the channels of a token's patches behind each other."""
    return shuffled.reshape(-1, shuffled.shape[-1] // patches.shape[-1], patches.shape[-1]).mean(1)


def _pool_gemma(base: Model, patches: Tensor, arguments: Arguments) -> Tensor:
    return _row_by_row(base.multi_modal_projector.avg_pool(_as_square(patches)))


def _as_square(patches: Tensor) -> Tensor:
    """[pictures, patches, channels] -> [pictures, channels, side, side]."""
    return patches.unflatten(1, (round(patches.shape[1] ** 0.5), -1)).movedim(-1, 1)


def _stride_ovis(base: Model, patches: Tensor, arguments: Arguments) -> Tensor:
    """A picture whose side is no multiple of the stride gets more rows and columns, which are empty."""
    stride = base.config.vision_config.hidden_stride
    return _row_by_row(F.avg_pool2d(_as_square(patches), stride, ceil_mode=True))


def _row_by_row(grids: Tensor) -> Tensor:
    """[pictures, channels, rows, columns] -> [tokens, channels]."""
    return grids.movedim(1, -1).flatten(0, 2)


# Of the maps that may leave pictures whose tokens are no square.
_GRIDS: dict[Map, Callable[[Model, Tensor, Arguments], Grids]] = {
    _each_patch: picture_grids,
    _any_resolution: _joined_grids,
    merge_neighbours: frame_grids,
    merge_windows: frame_grids,
    merge_rows: frame_grids,
    merge_sized: frame_grids,
    merge_pooled: pooled_grids,
    merge_padded: padded_grids,
    merge_placed: placed_grids,
    merge_grids: picture_grids,
}

_neighbours = PatchLayout(merge_neighbours, merge_neighbours)
_windows = PatchLayout(
    merge_windows,
    merge_windows,
    # The blocks between see single windows only.
    block=lambda config: max(config.vision_config.fullatt_block_indexes),
)


def _deepest_of_adapter(config: Any) -> int:
    depth = tower_depth(config) or 0
    return max(layer % depth for layer in config.adapter_config.vision_feature_layer)


# By the model type of a configuration.
PATCH_LAYOUTS: dict[str, PatchLayout] = {
    "llava": PatchLayout(_each_patch, squares=True, merges=True),
    "llava_next": PatchLayout(_any_resolution, merges=True),
    "llava_next_video": PatchLayout(_any_resolution, _next_video),
    "llava_onevision": PatchLayout(_any_resolution, _onevision_video),
    "qwen2_vl": _neighbours,
    "qwen2_5_vl": _windows,
    "qwen3_vl": _neighbours,
    "glm4v": _neighbours,
    "internvl": PatchLayout(_shuffle_internvl, squares=True),
    "idefics3": PatchLayout(_shuffle_idefics),
    "smolvlm": PatchLayout(_shuffle_idefics),
    "gemma3": PatchLayout(_pool_gemma, squares=True),
    "paligemma": PatchLayout(_each_patch, squares=True, merges=True),
    "mistral3": PatchLayout(merge_grids),
    "aya_vision": PatchLayout(_shuffle_projected),
    "cogvlm": PatchLayout(_each_patch, squares=True),
    "qwen3_vl_moe": _neighbours,
    "qwen3_5": _neighbours,
    "qwen3_5_moe": _neighbours,
    "glm4v_moe": _neighbours,
    "glm46v": _neighbours,
    "glm_ocr": _neighbours,
    "qwen2_5_omni_thinker": _windows,
    "qwen3_omni_moe_thinker": _neighbours,
    "paddleocr_vl": PatchLayout(merge_rows),
    "kimi_k25": PatchLayout(merge_rows),
    "video_llama_3": PatchLayout(merge_sized),
    "cosmos3_edge": PatchLayout(merge_neighbours),
    "lfm2_vl": PatchLayout(merge_padded),
    "cohere2_vision": PatchLayout(_shuffle_projected),
    "ovis2": PatchLayout(_stride_ovis),
    "lighton_ocr": PatchLayout(merge_grids),
    "video_llava": PatchLayout(_each_patch),
    "deepseek_vl": PatchLayout(_each_patch),
    "janus": PatchLayout(_each_patch),
    "molmo2": PatchLayout(merge_pooled, block=_deepest_of_adapter),
    "gemma4": PatchLayout(merge_placed, merge_placed),
    "llama4": PatchLayout(_shuffle_llama, squares=True, cls_last=True),
}
