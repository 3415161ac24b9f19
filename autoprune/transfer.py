"""Host numbers on their way to a device."""

from __future__ import annotations

from typing import Any

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
