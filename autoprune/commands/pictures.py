"""The picture as the model saw it, with the places of its visual tokens."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from PIL import Image

from ..loading import Loaded
from ..methods.looking import Looked
from ..viz import View, join_tiles, views_of

Grid = tuple[int, int]


def as_seen(loaded: Loaded, inputs: Any, original: Image.Image) -> tuple[Image.Image, Grid]:
    """What the image processor made of `original`, and the rows and columns of visual tokens.

    Raises:
        ValueError: the model cuts pictures into several tiles: its tokens form no single grid.
    """
    if "image_grid_thw" in inputs:
        return _resized(loaded, inputs, original)
    pixels = inputs["pixel_values"].squeeze()
    config = loaded.model.config
    visual = int((inputs["input_ids"] == config.image_token_id).sum())
    if pixels.ndim != 3 or pixels.shape[0] != 3:
        raise _no_grid(config)
    height, width = pixels.shape[1:]
    rows = round(math.sqrt(visual * height / width))
    if rows == 0 or visual % rows or abs(visual / rows / rows - width / height) > 0.05:
        raise _no_grid(config)
    return _denormalised(loaded, pixels), (rows, visual // rows)


def views(loaded: Loaded, inputs: Any, original: Image.Image, looked: Looked) -> list[View]:
    """What the decoder sees of `original`: the whole, its tiles together, and a small version of it if any.

    Args:
        inputs: as `prepare` gives them, of this one picture.
        looked: of the same inputs.

    Raises:
        ValueError: where the visual tokens lie is not known of this family.
    """
    if looked.places is None:
        image, grid = as_seen(loaded, inputs, original)
        return [View.whole(image, grid)]
    places = looked.places.numpy()
    count = len(np.unique(places[~np.isnan(places[:, 0]), 0]))
    config, pixels = loaded.model.config, inputs["pixel_values"]
    if "image_grid_thw" in inputs:
        # The processor resizes to whole patches; the grid is laid over the picture as it was.
        return views_of([original] * count, places)
    if getattr(config, "image_grid_pinpoints", None):
        # The first tile is the small version. The others are joined and cut to the picture.
        small = _denormalised(loaded, pixels.flatten(0, -4)[0])
        return views_of([small, original][:count], places)[::-1]
    if "image_sizes" in inputs:
        return views_of([original], places)
    tiles = [_denormalised(loaded, tile) for tile in pixels.flatten(0, -4)]
    if len(tiles) != count:
        raise _no_grid(config)
    return join_tiles(views_of(tiles, places), original)


def _resized(loaded: Loaded, inputs: Any, original: Image.Image) -> tuple[Image.Image, Grid]:
    """Models of native resolution resize to whole patches, and merge some of them to a token."""
    vision = loaded.model.config.vision_config
    (frames, rows, columns), *others = inputs["image_grid_thw"].tolist()
    if frames != 1 or others:
        raise _no_grid(loaded.model.config)
    picture = original.resize((columns * vision.patch_size, rows * vision.patch_size))
    merge = vision.spatial_merge_size
    return picture, (rows // merge, columns // merge)


def _denormalised(loaded: Loaded, pixels: Any) -> Image.Image:
    processor = loaded.processor.image_processor
    mean, std = np.asarray(processor.image_mean), np.asarray(processor.image_std)
    values = pixels.float().cpu().numpy().transpose(1, 2, 0) * std + mean
    return Image.fromarray((values.clip(0, 1) * 255).round().astype(np.uint8))


def _no_grid(config: Any) -> ValueError:
    return ValueError(
        f"{config.model_type} cuts a picture into several tiles, so its visual tokens form no "
        "single grid to draw; leave --picture out, or see whether `autoprune explain` knows them"
    )
