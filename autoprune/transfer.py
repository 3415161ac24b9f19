"""Host numbers on their way to a device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

# Bytes: every array begins at a multiple.
ALIGNED = 16


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
    types = [torch.bool if array.dtype == bool else torch.int64 for array in arrays]
    arrays = [
        array.astype(bool if array.dtype == bool else np.int64, "C", copy=False) for array in arrays
    ]
    sizes = [-(-array.nbytes // ALIGNED) * ALIGNED for array in arrays]
    starts = np.cumsum([0, *sizes]).tolist()
    # An empty tensor has no strides to be viewed by.
    buffer = np.zeros(starts[-1] + ALIGNED, dtype=np.uint8)
    for start, array in zip(starts, arrays, strict=False):
        buffer[start : start + array.nbytes] = array.reshape(-1).view(np.uint8)
    moved = to_device(buffer, device)
    return [
        moved[start : start + array.nbytes].view(dtype).view(array.shape)
        for start, array, dtype in zip(starts, arrays, types, strict=False)
    ]
