"""One computation of image or video features, and what is seen of the tower meanwhile."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .maps import setting, token_places
from .merging import MergedPatches, Prompts
from .patches import cls_attention, padded_patches, patches_outside, received_attention
from .tower import TowerParts
from .view import VisionView


@dataclass
class Call:
    """One computation of image or video features.

    tower: what is observed. arguments: those of the call.
    prompts: those that the pictures belong to, for patches to merge; empty if they may not.
    merged: what has merged in the tower so far.
    pictures: how many pictures the tower saw at a time, and patches in each.
    seen: under the names of `Observation`, what each of these had, [pictures, patches, channels].
    """

    tower: TowerParts
    arguments: dict[str, Any]
    prompts: Prompts = ()
    merged: MergedPatches | None = None
    pictures: list[tuple[int, int]] = field(default_factory=list)
    seen: dict[str, list[Tensor]] = field(default_factory=dict)

    @torch.no_grad()
    def observe(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        mask: Any,
        scaling: float | None = None,
        cu_seq_lens_q: Tensor | None = None,
        **others: Any,
    ) -> None:
        """Keep what is wanted of a block's query and key, [images, heads, tokens, head dim]."""
        if module not in (self.tower.attention, self.tower.middle):
            return
        merged = self.merged
        if merged is not None:
            query, key = merged.spread(query), merged.spread(key)
        strategy = setting(self.tower.base, self.arguments, "vision_feature_select_strategy")
        first = int(strategy == "default")
        if self.tower.layout is not None and self.tower.layout.cls_last:
            query, key, first = query.roll(1, dims=2), key.roll(1, dims=2), 1
        pictures = [(query, key)]
        if cu_seq_lens_q is not None:
            lengths = cu_seq_lens_q.diff().tolist()
            pictures = list(zip(query.split(lengths, 2), key.split(lengths, 2), strict=True))
        for queries, keys in pictures:
            seen = self._wanted_of(module, queries, keys, scaling, mask, first)
            if module is self.tower.attention:
                self.pictures.append((keys.shape[0], keys.shape[2] - first))
                if merged is not None:
                    seen["vision_groups"] = merged.groups()[:, first:, None]
            for name, patches in seen.items():
                self.seen.setdefault(name, []).append(patches)

    def _wanted_of(
        self, module: Any, query: Tensor, key: Tensor, scaling: float | None, mask: Any, first: int
    ) -> dict[str, Tensor]:
        """What is wanted of a block's attention, [pictures, patches, channels], from patch `first` on."""
        wanted, seen = self.tower.wanted, {}
        is_last, is_middle = module is self.tower.attention, module is self.tower.middle
        by_cls = bool(first) and self.tower.has_cls
        if is_middle or (is_last and (wanted.received or (wanted.attention and not by_cls))):
            received = received_attention(query, key, scaling, mask)[:, first:, None]
            if is_middle:
                seen["vision_middle"] = received
            if is_last and wanted.received:
                seen["vision_received"] = received
            if is_last and wanted.attention:
                seen["vision_scores"] = received
        if is_last and wanted.attention and by_cls:
            seen["vision_scores"] = cls_attention(query, key, scaling)[..., None]
        if is_last and wanted.keys:
            seen["vision_keys"] = key.float().mean(dim=1)[:, first:]
        return seen

    @torch.no_grad()
    def view(self, medium: str) -> VisionView:
        """What was seen of patches, token by token."""
        tower, wanted, arguments, shape = (
            self.tower,
            self.tower.wanted,
            self.arguments,
            self._shape(),
        )
        to_tokens = getattr(tower.layout, medium)

        def of_tokens(patches: Tensor) -> Tensor:
            return to_tokens(tower.base, patches[..., None], arguments)[:, 0]

        values = {}
        for name, parts in self.seen.items():
            patches = torch.cat([part.flatten(0, 1) for part in parts]).unflatten(0, shape)
            tokens = to_tokens(tower.base, patches, arguments)
            values[name] = tokens if name == "vision_keys" else tokens[:, 0]
        # Padding must not win by its score.
        scored = wanted.attention or wanted.received
        if scored and tower.layout is not None and tower.layout.squares:
            pixels, size = arguments.get("pixel_values"), tower.patch_size
            if (padding := padded_patches(pixels, shape, size)) is not None:
                # A token is padding if all of its patches are.
                values["vision_padding"] = of_tokens(padding.float()) == 1
                if wanted.outside:
                    values["vision_outside"] = of_tokens(
                        patches_outside(arguments["pixel_values"], size)
                    )
        if wanted.places:
            places = token_places(to_tokens, tower.base, shape, arguments)
            values |= {} if places is None else {"places": places}
        return VisionView(values)

    def _shape(self) -> tuple[int, ...]:
        """(pictures, patches), or (patches,) if the pictures differ in size."""
        if len({patches for _, patches in self.pictures}) == 1:
            return sum(number for number, _ in self.pictures), self.pictures[0][1]
        return (sum(number * patches for number, patches in self.pictures),)
