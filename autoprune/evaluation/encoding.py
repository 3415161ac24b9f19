"""Pictures through the vision tower once, rather than once for every setting."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from ..contract import Needs, Observation, PromptState, Tower
from ..methods.base import Method
from ..policy.budget import Budget
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
        handle = _Look(tower).attach(model)
        try:
            features = handle.encode(**inputs)
        finally:
            handle.detach()
        rest = {name: value for name, value in inputs.items() if "pixel_values" not in name}
        return {**rest, "mm_encoder_outputs": features}

    return encode


@dataclass(frozen=True)
class _Look(Method):
    """Prunes nothing and sees what all the settings together want to see of the tower."""

    name: ClassVar[str] = "look"
    paper: ClassVar[str] = "none"

    seen: Tower
    budget: Budget = field(default_factory=lambda: Budget.ratio(1))

    def tower(self) -> Tower:
        return self.seen

    def needs(self, cut: int, state: PromptState) -> Needs | None:
        return None

    def select(self, seen: Observation, state: PromptState) -> None:
        """Never asked."""
