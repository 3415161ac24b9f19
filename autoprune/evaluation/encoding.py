"""Pictures through the vision tower once, rather than once for every setting."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..contract import Tower
from ..methods.no_pruning import NoPruning
from .settings import Setting

Encode = Callable[[Any], Any]


def encoder(model: Any, settings: Sequence[Setting]) -> Encode | None:
    """What turns inputs with pixels into inputs with features that serve every setting.

    None if the model takes no features, or the settings want to see different blocks of its tower.
    """
    if "mm_encoder_outputs" not in inspect.signature(model.forward).parameters:
        return None
    wanted = [setting.method.tower() for setting in settings if setting.method is not None]
    middles = {tower.middle for tower in wanted} - {None}
    if len(middles) > 1:
        return None
    tower = Tower(
        attention=any(tower.attention for tower in wanted),
        keys=any(tower.keys for tower in wanted),
        received=any(tower.received for tower in wanted),
        middle=next(iter(middles), None),
        places=any(tower.places for tower in wanted),
    )

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
