"""Which token ids of a prompt stand for pictures: those that came with any.

A placeholder without a picture is a word like any other to transformers, and is not pruned.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..locate import Located

# Numbers that a model is given beside pictures.
OTHERS = {"inputs_embeds", "attention_mask", "input_features", "second_per_grid_ts"}


def visual_ids(
    located: Located, ids: torch.Tensor | None, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[int, ...]:
    """The ids of a prompt's visual tokens.

    Args:
        ids: the prompt's, best on the host.
        args, kwargs: what the model is called with.
    """
    named = {
        name for name, value in kwargs.items() if name not in OTHERS and _is_visual(name, value)
    }
    named |= set(kwargs.get("mm_encoder_outputs") or ())
    unnamed = any(_is_visual("", value) for value in args[1:])
    images = unnamed or any("video" not in name for name in named)
    videos = unnamed or any("video" in name for name in named)
    video = getattr(located.outer.config, "video_token_id", None)
    if videos and not images:
        # Some families write the frames of a video with the image's token.
        own = ids is None or (video is not None and bool(ids.eq(video).any()))
        return (video,) if own and video in located.visual_ids else located.visual_ids
    image = getattr(located.outer.config, "image_token_id", None)
    if images and not videos and video != image:
        return tuple(token for token in located.visual_ids if token != video)
    return located.visual_ids if images else ()


def _is_visual(name: str, value: Any) -> bool:
    """Whether an argument holds pixels or features: under any name, as families differ."""
    if isinstance(value, torch.Tensor):
        return value.is_floating_point()
    return name.startswith("pixel_values") and value is not None
