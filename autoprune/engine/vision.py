"""Scores of visual tokens from the vision tower, in the order in which the decoder sees the tokens.

The tower's attention is tapped in the block whose output the decoder receives. With a CLS token the
score is the CLS row; without one it is the attention that a patch receives within its picture. The
model's own packing then carries the scores from patches to visual tokens.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import wraps
from typing import Any

import numpy as np
import torch
from torch import nn

from .vision_maps import FAMILIES, setting, tower_depth
from .vision_patches import cls_attention, padded_patches, received_attention

MEDIA = ("image", "video")


@dataclass
class VisionScores:
    """Scores of the visual tokens of a batch, flat, prompt by prompt.

    scores: float32 [tokens], NaN for tokens without a patch. padding: bool [tokens] or None.
    """

    scores: torch.Tensor
    padding: torch.Tensor | None

    def per_prompt(
        self, counts: Sequence[int]
    ) -> tuple[list[torch.Tensor], list[torch.Tensor] | None]:
        """Split by prompt, repeating each prompt's scores where generation expanded the batch.

        Returns:
            Scores and padding of each prompt; no scores at all if they are not of these prompts.
        """
        total, have = sum(counts), self.scores.shape[0]
        if not have or not total or total % have:
            return [], None
        repeats = total // have
        own = list(counts[::repeats])
        if [n for n in own for _ in range(repeats)] != list(counts):
            return [], None

        def split(flat: torch.Tensor) -> list[torch.Tensor]:
            return [part for part in flat.split(own) for _ in range(repeats)]

        return split(self.scores), None if self.padding is None else split(self.padding)


def in_prompt_order(
    image: VisionScores, video: VisionScores, is_video: Sequence[np.ndarray]
) -> VisionScores:
    """Merge the scores of both media. Families that take videos know of no padding.

    Args:
        image, video: the scores of each medium; the batch may have been expanded since.
        is_video: bool [N] for each prompt, which of its visual tokens hold a video.
    """
    images, _ = image.per_prompt([int((~kind).sum()) for kind in is_video])
    videos, _ = video.per_prompt([int(kind.sum()) for kind in is_video])
    if not images or not videos:
        # Only one medium is in these prompts; `per_prompt` will find out whether it fits.
        return video if videos else image
    merged = []
    for first, second, kind in zip(images, videos, is_video, strict=True):
        place = np.argsort(np.argsort(kind, kind="stable"))
        merged.append(torch.cat([first, second])[torch.from_numpy(place).to(first.device)])
    return VisionScores(torch.cat(merged), None)


@dataclass
class _Call:
    """One computation of image or video features: its arguments, and its patches' scores so far."""

    arguments: dict[str, Any]
    patches: list[torch.Tensor] = field(default_factory=list)


class VisionTap:
    """Collects scores while a model computes its image and video features.

    It wraps `get_image_features` and `get_video_features` on the instance (generation calls them
    ahead of the forward, a plain forward inside it) and is undone by `remove`. What was collected
    waits, per thread, for `take`. A family that is not in the table gives no scores.
    """

    def __init__(self, base: nn.Module, vision: nn.Module):
        self.base, self.vision = base, vision
        self.family = FAMILIES.get(base.config.model_type)
        self.attention = self._attention()
        self.has_cls = any(
            getattr(module, name, None) is not None
            for module in vision.modules()
            for name in ("class_embedding", "cls_token")
        )
        self._covered: dict[str, Any] = {}
        self._local = threading.local()

    @property
    def available(self) -> bool:
        return self.attention is not None

    def install(self) -> None:
        if self.available:
            for medium in MEDIA:
                if getattr(self.family, medium) is not None:
                    self._wrap(medium)

    def remove(self) -> None:
        for name, covered in self._covered.items():
            if covered is None:
                delattr(self.base, name)
            else:
                setattr(self.base, name, covered)
        self._covered = {}
        self._local = threading.local()

    def take(self, input_ids: torch.Tensor | None, visual: np.ndarray) -> VisionScores | None:
        """The scores collected in this thread since the last call, in the order of the prompts.

        Args:
            input_ids: [batch, length]; tells videos from images where both were seen.
            visual: bool [batch, length], the visual tokens.
        """
        ready, self._local.ready = getattr(self._local, "ready", None) or {}, None
        if len(ready) < 2:
            return next(iter(ready.values()), None)
        if input_ids is None:
            return None
        is_video = input_ids.cpu().numpy() == self.base.config.video_token_id
        rows = [kind[seen] for kind, seen in zip(is_video, visual, strict=True)]
        return in_prompt_order(ready["image"], ready["video"], rows)

    @torch.no_grad()
    def observe(
        self, module, query, key, attention_mask, scaling=None, cu_seq_lens_q=None, **kwargs
    ) -> None:
        """Called with the tower's query and key, [images, heads, tokens, head dim]."""
        call = getattr(self._local, "call", None)
        if call is None:
            return
        strategy = setting(self.base, call.arguments, "vision_feature_select_strategy")
        first = 1 if strategy == "default" else 0
        if first and self.has_cls:
            call.patches.append(cls_attention(query, key, scaling))
            return
        pictures = [(query, key)]
        if cu_seq_lens_q is not None:
            lengths = cu_seq_lens_q.diff().tolist()
            pictures = list(zip(query.split(lengths, 2), key.split(lengths, 2), strict=True))
        for queries, keys in pictures:
            call.patches.append(
                received_attention(queries, keys, scaling, attention_mask)[:, first:]
            )

    def _wrap(self, medium: str) -> None:
        name = f"get_{medium}_features"
        original = getattr(self.base, name)
        signature = inspect.signature(original)

        @wraps(original)
        def get_features(*args, **kwargs):
            if getattr(self._local, "call", None) is not None:
                # A video may be computed by way of the images.
                return original(*args, **kwargs)
            call = self._local.call = _Call(dict(signature.bind(*args, **kwargs).arguments))
            try:
                features = original(*args, **kwargs)
            finally:
                self._local.call = None
            if call.patches:
                ready = getattr(self._local, "ready", None) or {}
                self._local.ready = {**ready, medium: self._map(medium, call)}
            return features

        self._covered[name] = self.base.__dict__.get(name)
        setattr(self.base, name, get_features)

    @torch.no_grad()
    def _map(self, medium: str, call: _Call) -> VisionScores:
        same_size = len({tuple(p.shape[1:]) for p in call.patches}) == 1
        patches = torch.cat(call.patches if same_size else [p.flatten() for p in call.patches])
        to_tokens, padding = getattr(self.family, medium), None
        if self.family.squares:
            size = self.base.config.vision_config.patch_size
            size = size if isinstance(size, int) else size[0]
            padding = padded_patches(call.arguments.get("pixel_values"), patches.shape, size)
        if padding is not None:
            # A token is padding if none of its patches is real.
            padding = to_tokens(self.base, (~padding).float(), call.arguments) == 0
        return VisionScores(to_tokens(self.base, patches, call.arguments), padding)

    def _attention(self) -> nn.Module | None:
        depth = tower_depth(self.base.config)
        if self.family is None or depth is None:
            return None
        index = self.family.block(self.base.config)
        modules = self.vision.modules()
        blocks = next(
            (m for m in modules if isinstance(m, nn.ModuleList) and len(m) == depth), None
        )
        if blocks is None or index < 0:
            return None
        return next((m for m in blocks[index].modules() if hasattr(m, "is_causal")), None)
