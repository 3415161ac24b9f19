"""What methods see of the vision tower, in the order in which the decoder sees the visual tokens.

The tower's attention is tapped in the block whose output the decoder receives. With a CLS token a
patch's score is the CLS row; without one it is the attention that the patch receives within its picture.
The model's own packing then carries scores, keys and places from patches to visual tokens.
"""

from __future__ import annotations

import inspect
import math
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from transformers.utils import ModelOutput

from ...errors import UnsupportedError
from ..locate import tower_attentions, tower_blocks
from .maps import FAMILIES, as_configured, setting, token_places, tower_depth
from .merging import Rule, TowerMerging
from .patches import cls_attention, padded_patches, patches_outside, received_attention
from .view import VisionView, in_prompt_order

if TYPE_CHECKING:
    from ...contract import Tower

MEDIA = ("image", "video")
# What was seen of the tower travels with the features it belongs to, under this name.
ATTRIBUTE = "_autoprune"
# What the tower's output holds beside the features that the decoder reads.
INTERMEDIATE = {"last_hidden_state", "hidden_states", "attentions"}


@dataclass
class _Call:
    """One computation of image or video features.

    arguments: those of the call.
    pictures: how many pictures the tower saw at a time, and patches in each.
    seen: under the names of `Observation`, what each of these had, [pictures, patches, channels].
    """

    arguments: dict[str, Any]
    pictures: list[tuple[int, int]] = field(default_factory=list)
    seen: dict[str, list[torch.Tensor]] = field(default_factory=dict)

    def add(self, name: str, patches: torch.Tensor) -> None:
        self.seen.setdefault(name, []).append(patches)

    def shape(self) -> tuple[int, ...]:
        """(pictures, patches), or (patches,) if the pictures differ in size."""
        if len({patches for _, patches in self.pictures}) == 1:
            return sum(number for number, _ in self.pictures), self.pictures[0][1]
        return (sum(number * patches for number, patches in self.pictures),)


class VisionTap:
    """Collects what was asked for while a model computes its image and video features.

    It watches `get_image_features` and `get_video_features` (generation calls them ahead of the
    forward, a plain forward inside it). What was collected waits, per thread, for `take`, and stays
    with the features for when they are used again (`mm_encoder_outputs`). A family that is not in the
    table gives nothing.

    Keys are those the attention uses: where a tower rotates them by their place (Qwen, Pixtral), a
    token's key is a mean over rotations that differ by a patch or so. Where the middle block looks at
    windows only (Qwen2.5-VL), attention is received within the window; a CLS token gives some, too.

    Args:
        base: the model without its language head.
        vision: its vision tower.
        wanted: what the method must see.
        rule: how it merges patches, if it wants to.
    """

    def __init__(self, base: nn.Module, vision: nn.Module, wanted: Tower, rule: Rule):
        self.base, self.vision, self.wanted = base, vision, wanted
        self.family = FAMILIES.get(base.config.model_type)
        self.has_cls = any(
            getattr(module, name, None) is not None
            for module in vision.modules()
            for name in ("class_embedding", "cls_token")
        )
        blocks = self._blocks()
        self.attention, self.middle = self._watched(tower_attentions(blocks))
        layer = getattr(base.config, "vision_feature_layer", -1)
        merges = wanted.merge and self.family and self.family.merges and isinstance(layer, int)
        self.merging = TowerMerging(rule, blocks if merges else [], self.has_cls)
        self._local = threading.local()

    @property
    def available(self) -> bool:
        """Whether the tower gives scores, be they wanted or not."""
        return self.attention is not None

    @property
    def tapped(self) -> list[nn.Module]:
        """The tower's attention modules that `attend` must handle."""
        wanted = self.wanted
        seen = (wanted.attention, wanted.keys, wanted.received, wanted.places, wanted.merge)
        if not any(seen) and wanted.middle is None:
            return []
        watched = (self.attention, self.middle, *self.merging.attentions)
        return [module for module in watched if module is not None]

    def watches(self, medium: str) -> bool:
        """Whether anything is to be seen while features of that medium are computed."""
        return bool(self.tapped) and getattr(self.family, medium) is not None

    def reset(self) -> None:
        """Drop what is left of computations that did not come to their end."""
        self.merging.reset()
        self._local = threading.local()

    def take(self, input_ids: torch.Tensor | None, visual: np.ndarray) -> VisionView | None:
        """What was collected in this thread since the last call, in the order of the prompts.

        Args:
            input_ids: [batch, length]; tells videos from images where both were seen.
            visual: bool [batch, length], the visual tokens.
        """
        self.merging.forget()
        ready, self._local.ready = self._ready(), {}
        if len(ready) < 2:
            return next(iter(ready.values()), None)
        if input_ids is None:
            return None
        is_video = input_ids.numpy(force=True) == self.base.config.video_token_id
        rows = [kind[seen] for kind, seen in zip(is_video, visual, strict=True)]
        return in_prompt_order(ready["image"], ready["video"], rows)

    def encode(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Features of pictures and videos, by medium, with what was seen of the tower.

        Args:
            inputs: what the processor gave; the rest of it is passed over.

        Raises:
            ValueError: there are neither pictures nor videos in it.
            UnsupportedError: videos for a model that takes none.
        """
        self.merging.forget()
        encoded = {}
        for medium in MEDIA:
            features = getattr(self.base, f"get_{medium}_features", None)
            pixels = "pixel_values" if medium == "image" else "pixel_values_videos"
            if inputs.get(pixels) is None:
                continue
            if features is None:
                raise UnsupportedError(
                    f"{type(self.base).__name__} takes no {medium}s, but {pixels} was given; leave it out"
                )
            taken = inspect.signature(features).parameters
            output = features(**{name: inputs[name] for name in taken if name in inputs})
            encoded[medium] = same_features(output, without=INTERMEDIATE)
        if not encoded:
            given = ", ".join(inputs) or "nothing"
            raise ValueError(
                "encode needs pixel_values or pixel_values_videos, as the processor makes them of pictures and "
                f"videos, but got {given}; pass all that the processor gave"
            )
        self.forget()
        return encoded

    def forget(self) -> None:
        """Drop what waits for `take` in this thread."""
        self._local.ready = {}

    def recall(self, encoded: Mapping[str, Any] | None) -> None:
        """Take what was collected when these features were computed, for features that are used again.

        Args:
            encoded: the model's `mm_encoder_outputs`: what `get_image_features` and
                `get_video_features` returned, by medium.
        """
        for medium, features in (encoded or {}).items():
            view = getattr(features, ATTRIBUTE, None)
            if view is not None:
                self._ready()[medium] = view

    def _ready(self) -> dict[str, VisionView]:
        """What waits for `take` in this thread, by medium."""
        if not hasattr(self._local, "ready"):
            self._local.ready = {}
        return self._local.ready

    def attend(
        self, attend, module, query, key, value, attention_mask, *args, **kwargs
    ) -> tuple[torch.Tensor, Any]:
        """The attention of one of the tower's blocks, observed, and to tokens by their patches."""
        self.observe(module, query, key, attention_mask, **kwargs)
        attention_mask = self.merging.see(module, query, key, attention_mask, **kwargs)
        return attend(module, query, key, value, attention_mask, *args, **kwargs)

    @torch.no_grad()
    def observe(
        self, module, query, key, attention_mask, scaling=None, cu_seq_lens_q=None, **kwargs
    ) -> None:
        """Called with the query and key of a tapped block, [images, heads, tokens, head dim]."""
        call = getattr(self._local, "call", None)
        if call is None or module not in (self.attention, self.middle):
            return
        merged = self.merging.merged
        if merged is not None:
            query, key = merged.spread(query), merged.spread(key)
        strategy = setting(self.base, call.arguments, "vision_feature_select_strategy")
        first = int(strategy == "default")
        pictures = [(query, key)]
        if cu_seq_lens_q is not None:
            lengths = cu_seq_lens_q.diff().tolist()
            pictures = list(zip(query.split(lengths, 2), key.split(lengths, 2), strict=True))
        for queries, keys in pictures:
            if module is self.middle:
                received = received_attention(queries, keys, scaling, attention_mask)
                call.add("vision_middle", received[:, first:, None])
            if module is self.attention:
                if merged is not None:
                    call.add("vision_groups", merged.groups()[:, first:, None])
                call.pictures.append((keys.shape[0], keys.shape[2] - first))
                if self.wanted.keys:
                    call.add("vision_keys", keys.float().mean(dim=1)[:, first:])
                by_cls = bool(first) and self.has_cls
                if self.wanted.received or (self.wanted.attention and not by_cls):
                    received = received_attention(queries, keys, scaling, attention_mask)
                    received = received[:, first:, None]
                if self.wanted.received:
                    call.add("vision_received", received)
                if self.wanted.attention and by_cls:
                    call.add("vision_scores", cls_attention(queries, keys, scaling)[..., None])
                elif self.wanted.attention:
                    call.add("vision_scores", received)

    def watch(
        self, medium: str, get_features: Callable, signature: inspect.Signature, *args, **kwargs
    ) -> Any:
        """Call `get_image_features` or `get_video_features`, and keep what is seen meanwhile."""
        arguments = dict(signature.bind(*args, **kwargs).arguments)
        # Older releases pass a picture's size on without naming it.
        arguments |= arguments.pop("kwargs", {})
        call = self._local.call = _Call(arguments)
        try:
            with self.merging.running(as_configured(self.base, arguments)):
                features = get_features(*args, **kwargs)
        finally:
            self._local.call = None
        if call.pictures:
            view = self._map(medium, call)
            self._ready()[medium] = view
            if isinstance(features, ModelOutput):
                setattr(features, ATTRIBUTE, view)
        return features

    @torch.no_grad()
    def _map(self, medium: str, call: _Call) -> VisionView:
        to_tokens, shape = getattr(self.family, medium), call.shape()
        values = {}
        for name, parts in call.seen.items():
            patches = torch.cat([part.flatten(0, 1) for part in parts]).unflatten(0, shape)
            tokens = to_tokens(self.base, patches, call.arguments)
            values[name] = tokens if name == "vision_keys" else tokens[:, 0]
        padding = self._padding(call, shape)
        if padding is not None:
            # A token is padding if none of its patches is real.
            real = to_tokens(self.base, (~padding).float()[..., None], call.arguments)
            values["vision_padding"] = real[:, 0] == 0
        if self.wanted.outside and padding is not None:
            outside = patches_outside(call.arguments["pixel_values"], self._patch_size)
            values["vision_outside"] = to_tokens(self.base, outside[..., None], call.arguments)[
                :, 0
            ]
        if self.wanted.places:
            places = token_places(to_tokens, self.base, shape, call.arguments)
            if places is not None:
                values["places"] = places
        return VisionView(values)

    def _padding(self, call: _Call, shape: Sequence[int]) -> torch.Tensor | None:
        """Which patches hold the padding of a picture; only its scores must not win by it."""
        scored = self.wanted.attention or self.wanted.received
        if not scored or not self.family.squares:
            return None
        return padded_patches(call.arguments.get("pixel_values"), shape, self._patch_size)

    @property
    def _patch_size(self) -> int:
        size = self.base.config.vision_config.patch_size
        return size if isinstance(size, int) else size[0]

    def _blocks(self) -> list[nn.Module]:
        """The tower's blocks, up to the one that is scored; none if they are not known."""
        if self.family is None:
            return []
        blocks = tower_blocks(self.vision, tower_depth(self.base.config))
        return blocks[: self.family.block(self.base.config) + 1]

    def _watched(
        self, attentions: Sequence[nn.Module | None]
    ) -> tuple[nn.Module | None, nn.Module | None]:
        """Of the blocks' attention that of the last, and that of the middle one if it is wanted."""
        if not attentions:
            return None, None
        if self.wanted.middle is None:
            return attentions[-1], None
        # 29 / 45 * 45 is a hair more than 29.
        middle = math.ceil(round(self.wanted.middle * tower_depth(self.base.config), 6)) - 1
        return attentions[-1], attentions[min(max(middle, 0), len(attentions) - 1)]


def same_features(output: Any, without: Collection[str] = ()) -> Any:
    """A tower's output in a container of its own, with what was seen of the tower.

    Args:
        without: names of what is left out.
    """
    if not isinstance(output, ModelOutput):
        return output
    same = type(output)(**{name: value for name, value in output.items() if name not in without})
    if (view := getattr(output, ATTRIBUTE, None)) is not None:
        setattr(same, ATTRIBUTE, view)
    return same
