"""The vision tower of one model, and what a method must see of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import nn

from ...contract import Tower
from ..locate import Model
from .maps import PATCH_LAYOUTS, PatchLayout, tower_depth


@dataclass(frozen=True, eq=False)
class TowerParts:
    """The parts of a vision tower that are observed. A family that is not in the table gives nothing.

    base: the model without its language head.
    wanted: what the method must see.
    layout: None for a family that is not in the table.
    has_cls: whether a CLS token comes first.
    attention: the attention module of the block whose output the decoder receives.
    middle: that of the middle block, if it is wanted.
    merging: the blocks behind which patches merge, up to the one whose output the decoder receives.
    """

    base: Model
    wanted: Tower
    layout: PatchLayout | None
    has_cls: bool
    attention: nn.Module | None
    middle: nn.Module | None
    merging: list[nn.Module]

    @classmethod
    def of(cls, base: Model, vision: nn.Module, wanted: Tower) -> TowerParts:
        config = base.config
        layout, depth = PATCH_LAYOUTS.get(config.model_type), tower_depth(config)
        blocks = [] if layout is None else _blocks(vision, depth)[: layout.block(config) + 1]
        layer = getattr(config, "vision_feature_layer", -1)
        merges = wanted.merge and layout is not None and layout.merges and isinstance(layer, int)
        attentions = [_attention(block) for block in blocks]
        parts = cls.of_attentions(base, vision, wanted, attentions)
        return replace(parts, layout=layout, merging=blocks if merges else [])

    @classmethod
    def of_attentions(
        cls,
        base: Model,
        vision: nn.Module,
        wanted: Tower,
        attentions: Sequence[nn.Module | None],
    ) -> TowerParts:
        """From the attention modules of its blocks, up to the one whose output the decoder receives.

        Args:
            base: a model of transformers, with or without weights: its configuration and its packing are used.
            vision: the tower, of transformers or of another engine.
        """
        depth, middle = tower_depth(base.config), None
        if attentions and wanted.middle is not None:
            # 29 / 45 * 45 is a hair more than 29.
            number = math.ceil(round(wanted.middle * (depth or 0), 6))
            middle = attentions[min(max(number, 1), len(attentions)) - 1]
        return cls(
            base,
            wanted,
            PATCH_LAYOUTS.get(base.config.model_type),
            has_cls=any(
                getattr(module, name, None) is not None
                for module in vision.modules()
                for name in ("class_embedding", "cls_token")
            ),
            attention=attentions[-1] if attentions else None,
            middle=middle,
            merging=[],
        )

    @property
    def observed(self) -> list[nn.Module]:
        """The attention modules that are observed; none if nothing is wanted of them."""
        wanted = self.wanted
        seen = (wanted.attention, wanted.keys, wanted.received, wanted.places, wanted.merge)
        if not any(seen) and wanted.middle is None:
            return []
        modules = (self.attention, self.middle, *map(_attention, self.merging))
        return [module for module in modules if module is not None]

    @property
    def patch_size(self) -> int:
        size = self.base.config.vision_config.patch_size
        return size if isinstance(size, int) else size[0]


def _blocks(vision: nn.Module, depth: int | None) -> list[nn.Module]:
    """The blocks of a vision tower, which are `depth`; none if they are not found."""
    stacks = (m for m in vision.modules() if isinstance(m, nn.ModuleList) and len(m) == depth)
    return list(next(stacks, ()))


def _attention(block: nn.Module) -> nn.Module | None:
    """The attention module of a block; that of Llama 4 does not say whether it is causal."""
    return next(
        (m for m in block.modules() if hasattr(m, "is_causal") or hasattr(m, "scaling")), None
    )
