"""Names of weights that newer releases of transformers write and vLLM does not know."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

import torch

_TOWER = re.compile(r"(^|\.)vision_tower\.(?!vision_model\.)")


def with_clip_names(
    weights: Iterable[tuple[str, torch.Tensor]],
) -> Iterator[tuple[str, torch.Tensor]]:
    """Weights with a CLIP tower's under `vision_tower.vision_model`, where vLLM looks for them."""
    for name, weight in weights:
        yield _TOWER.sub(r"\1vision_tower.vision_model.", name), weight
