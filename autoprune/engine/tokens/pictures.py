"""Which visual tokens of a prompt are of one picture."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from .layout import Layout

# Whether the visual token of this number and the next one, which stands apart, are of one picture; from the
# prompt's ids [S] and the columns of its visual tokens [N].
Joined = Callable[[np.ndarray, np.ndarray, int], bool]


def picture_sizes(layout: Layout, ids: torch.Tensor | None, config: Any) -> list[list[int]]:
    """How many visual tokens each picture of each prompt has, in the prompts' order.

    A picture is a run of visual tokens with other tokens around it. Families that write other tokens between
    the rows or tiles of one picture are known, and so are those whose pictures all have one number of tokens.
    Of other families, pictures with nothing between them count as one. Each frame of a video that stands
    apart counts as a picture.

    Args:
        ids: LongTensor [batch, S] on the host; None where there are none, and then each run is a picture.
        config: the model's configuration.
    """
    joined, fixed = _joined(config), _fixed_number(config)
    prompts = []
    for row, visual in enumerate(layout.visual):
        columns = np.flatnonzero(visual)
        (ends,) = np.nonzero(np.diff(columns) > 1)
        if joined is not None and ids is not None and len(ends):
            text = ids[row].numpy()
            ends = ends[[not joined(text, columns, int(end)) for end in ends]]
        starts = [0, *(ends + 1).tolist(), len(columns)] if len(columns) else [0]
        sizes = np.diff(starts).tolist()
        prompts.append([part for size in sizes for part in _parts(size, fixed)])
    return prompts


def _parts(size: int, fixed: int | None) -> list[int]:
    """The pictures of a run."""
    return [fixed] * (size // fixed) if fixed and size % fixed == 0 else [size]


def _fixed_number(config: Any) -> int | None:
    """How many tokens every picture has; None where that differs or is not known."""
    if config.model_type == "senna":
        return int(config.image_seq_length)
    vision = config.vision_config if config.model_type in ("llava", "paligemma") else None
    if vision is None or vision.model_type == "pixtral":
        return None
    with_cls = getattr(config, "vision_feature_select_strategy", "default") == "full"
    return int(vision.image_size // vision.patch_size) ** 2 + with_cls


def _joined(config: Any) -> Joined | None:
    """How to tell whether two runs are of one picture; None where each run is one."""
    if getattr(getattr(config, "vision_config", None), "model_type", None) == "pixtral":
        return _rows
    return _tiles if config.model_type in ("idefics3", "smolvlm") else None


def _rows(ids: np.ndarray, columns: np.ndarray, end: int) -> bool:
    """Whether a break of rows alone stands behind the visual token `end`; a picture ends with another token."""
    last = columns[-1] + 1
    single = columns[end + 1] - columns[end] == 2
    return bool(single and (last == len(ids) or ids[columns[end] + 1] != ids[last]))


def _tiles(ids: np.ndarray, columns: np.ndarray, end: int) -> bool:
    """Whether the mark that stands around pictures is there once: it begins each tile and ends each picture."""
    between = ids[columns[end] + 1 : columns[end + 1]]
    return bool((between == ids[columns[0] - 2]).sum() == 1)
