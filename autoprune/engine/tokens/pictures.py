"""Which visual tokens of a prompt are of one picture."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from .layout import Layout


def picture_sizes(layout: Layout, ids: torch.Tensor | None, model_type: str) -> list[list[int]]:
    """How many visual tokens each picture of each prompt has, in the prompts' order.

    A picture is a run of visual tokens with other tokens around it. Families that write other tokens between
    the rows or tiles of one picture are in `JOINED`. Pictures with nothing between them count as one, and each
    frame of a video that stands apart counts as a picture.

    Args:
        ids: LongTensor [batch, S] on the host; None where there are none, and then each run is a picture.
        model_type: the family.
    """
    joined = JOINED.get(model_type)
    prompts = []
    for row, visual in enumerate(layout.visual):
        columns = np.flatnonzero(visual)
        (ends,) = np.nonzero(np.diff(columns) > 1)
        if joined is not None and ids is not None and len(ends):
            text = ids[row].numpy()
            ends = ends[[not joined(text, columns, int(end)) for end in ends]]
        starts = [0, *(ends + 1).tolist(), len(columns)] if len(columns) else [0]
        prompts.append(np.diff(starts).tolist())
    return prompts


def _rows(ids: np.ndarray, columns: np.ndarray, end: int) -> bool:
    """Whether a break of rows alone stands behind the visual token `end`; a picture ends with another token."""
    last = columns[-1] + 1
    single = columns[end + 1] - columns[end] == 2
    return bool(single and (last == len(ids) or ids[columns[end] + 1] != ids[last]))


def _tiles(ids: np.ndarray, columns: np.ndarray, end: int) -> bool:
    """Whether the mark that stands around pictures is there once: it begins each tile and ends each picture."""
    between = ids[columns[end] + 1 : columns[end + 1]]
    return bool((between == ids[columns[0] - 2]).sum() == 1)


# Whether the visual token of this number and the next one, which stands apart, are of one picture; from the
# prompt's ids [S] and the columns of its visual tokens [N].
JOINED: dict[str, Callable[[np.ndarray, np.ndarray, int], bool]] = {
    "mistral3": _rows,
    "idefics3": _tiles,
    "smolvlm": _tiles,
}
