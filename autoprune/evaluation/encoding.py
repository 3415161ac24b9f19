"""Pictures through the vision tower once, rather than once for every setting."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..methods.no_pruning import NoPruning
from ..methods.side_by_side import union_of_towers
from .settings import Setting

Encode = Callable[[Any], Any]


def encoder(model: Any, settings: Sequence[Setting]) -> Encode | None:
    """What turns inputs with pixels into inputs with features that serve every setting.

    None if the model takes no features, or the settings want to see different blocks of its tower.
    """
    if "mm_encoder_outputs" not in inspect.signature(model.forward).parameters:
        return None
    wanted = [setting.method.tower() for setting in settings if setting.method is not None]
    tower = union_of_towers(wanted)
    if tower is None:
        return None

    @torch.inference_mode()
    def encode(inputs: Any) -> Any:
        handle = NoPruning(sees=tower).attach(model)
        try:
            features = handle.encode(**inputs)
        finally:
            handle.detach()
        rest = {name: value for name, value in inputs.items() if "pixel_values" not in name}
        return {**rest, "mm_encoder_outputs": features}

    return encode
