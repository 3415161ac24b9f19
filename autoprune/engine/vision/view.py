"""What was seen of the vision tower, token by token, and how it is shared out to prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass
class VisionView:
    """What was seen of the tower, flat over the visual tokens of a batch, prompt by prompt.

    values: tensors [tokens, ...] under the names of `Observation`: vision_scores, vision_padding, ...
    """

    values: dict[str, Tensor]

    def per_prompt(self, counts: Sequence[int]) -> dict[str, list[Tensor]]:
        """Split by prompt, repeating each prompt's values where generation expanded the batch.

        Returns:
            For each name one tensor per prompt, except for values that are not of these prompts.
        """
        prompts, total = {}, sum(counts)
        for name, flat in self.values.items():
            if not len(flat) or not total or total % len(flat):
                continue
            repeats = total // len(flat)
            own = list(counts[::repeats])
            if [n for n in own for _ in range(repeats)] == list(counts):
                prompts[name] = [part for part in flat.split(own) for _ in range(repeats)]
        return prompts


def in_prompt_order(
    image: VisionView, video: VisionView, is_video: Sequence[np.ndarray]
) -> VisionView:
    """Join what was seen of both media, as far as both have it (no video knows of padding).

    Args:
        image, video: the values of each medium; the batch may have been expanded since.
        is_video: bool [N] for each prompt, which of its visual tokens hold a video.
    """
    of_images = [int((~kind).sum()) for kind in is_video]
    of_videos = [int(kind.sum()) for kind in is_video]
    if not any(of_images) or not any(of_videos):
        # `per_prompt` will find out whether the one medium fits.
        return video if any(of_videos) else image
    images, videos = image.per_prompt(of_images), video.per_prompt(of_videos)
    if "places" in images and "places" in videos:
        pictures = 1 + float(image.values["places"][:, 0].nan_to_num().max())
        behind = torch.tensor([pictures, 0.0, 0.0])
        videos["places"] = [places + behind for places in videos["places"]]
    orders = [torch.from_numpy(np.argsort(np.argsort(k, kind="stable"))) for k in is_video]
    values = {}
    for name in (name for name in images if name in videos):
        parts = zip(images[name], videos[name], orders, strict=True)
        values[name] = torch.cat(
            [torch.cat([first, second])[order.to(first.device)] for first, second, order in parts]
        )
    return VisionView(values)
