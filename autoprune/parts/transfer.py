"""Host numbers on their way to a device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch


def to_device(values: Any, device: torch.device) -> torch.Tensor:
    """Numbers of the host (a sequence or a numpy array) as a tensor on `device`.

    On a GPU the copy takes its place in the stream: a copy from ordinary memory would make the host wait
    for all that was queued before it.
    """
    tensor = torch.as_tensor(values)
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def all_to_device(arrays: Sequence[np.ndarray], device: torch.device) -> list[torch.Tensor]:
    """Arrays of integers or bools in one copy, which on a GPU costs more than what is in it."""
    flags = [array.ravel() for array in arrays if array.dtype == bool]
    numbers = [array.ravel() for array in arrays if array.dtype != bool]
    # One number more, as an empty tensor has no strides to be viewed by.
    whole = np.concatenate([[0], *numbers], dtype=np.int64).view(np.uint8)
    moved = to_device(np.concatenate([whole, *flags], dtype=np.uint8), device)
    numbers_there = moved[: len(whole)].view(torch.int64)[1:].split([a.size for a in numbers])
    flags_there = moved[len(whole) :].view(torch.bool).split([a.size for a in flags])
    parts = {True: iter(flags_there), False: iter(numbers_there)}
    return [next(parts[array.dtype == bool]).view(array.shape) for array in arrays]
