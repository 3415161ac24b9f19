"""Caches of conversations, so that a further question need not read the picture again."""

from __future__ import annotations

import hashlib
from collections import deque
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import UnsupportedError
from ..methods.base import Method
from ..trace import Sample
from .job import Job


@dataclass(frozen=True, eq=False)
class Kept:
    """What is left of an answer.

    ids: LongTensor [length], the tokens that the cache holds, visual ones as they were before pruning.
    pictures: a digest of what was shown.
    sample: what the prompt cost.
    """

    ids: torch.Tensor
    pictures: bytes
    method: Method
    cache: Any
    sample: Sample

    def goes_on_in(self, job: Job, pictures: bytes, visual_ids: torch.Tensor) -> bool:
        """Whether the job's prompt is this one with words behind it."""
        ids, known = job.prompt.inputs["input_ids"][0], len(self.ids)
        return (
            len(ids) > known
            and self.pictures == pictures
            and self.method == job.method
            and torch.equal(ids[:known], self.ids)
            and not torch.isin(ids[known:], visual_ids).any()
        )


class Conversations:
    """The last caches. For the engine's thread alone.

    Args:
        most: how many are kept; each is as large as the cache of its answer.
        visual_ids: token ids that stand for pictures.
    """

    def __init__(self, most: int, visual_ids: torch.Tensor) -> None:
        self._visual_ids = visual_ids
        self._kept: deque[Kept] = deque(maxlen=most)

    def take(self, job: Job) -> Kept | None:
        """What the job goes on with, out of what is kept: a cache serves one answer at a time."""
        if not self._kept:
            return None
        pictures = digest(job)
        fits = [kept for kept in self._kept if kept.goes_on_in(job, pictures, self._visual_ids)]
        if not fits:
            return None
        longest = max(fits, key=lambda kept: len(kept.ids))
        self._kept.remove(longest)
        return longest

    def keep(self, job: Job, ids: torch.Tensor, cache: Any, sample: Sample) -> None:
        """Keep the cache of an answer, and forget the oldest if there are too many.

        Args:
            ids: [length], prompt and answer; the cache does not hold the last token.
        """
        self._kept.append(Kept(ids[:-1].cpu(), digest(job), job.method, cache, sample))


def check_model(model: Any) -> None:
    """Raise UnsupportedError for a model that keeps the positions of its last prompt on itself: conversations
    could not take turns.
    """
    if any(hasattr(module, "rope_deltas") for module in model.modules()):
        raise UnsupportedError(
            f"{type(model).__name__} keeps positions of its last prompt, so that conversations cannot be kept; "
            "leave --conversations out"
        )


def digest(job: Job) -> bytes:
    """Of the pictures as the model sees them."""
    sum_ = hashlib.blake2b(digest_size=16)
    for name, value in sorted(job.prompt.inputs.items()):
        if value.is_floating_point() or "grid" in name:
            sum_.update(f"{name} {tuple(value.shape)}".encode())
            sum_.update(value.contiguous().view(torch.uint8).numpy().tobytes())
    return sum_.digest()
