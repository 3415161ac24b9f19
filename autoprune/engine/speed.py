"""How fast a device runs the parts of a prefill, measured once for each kind of model on it.

Only methods that ask for it (`MethodContract.needs_speed`) have it measured: it takes about a second.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import numpy as np
import torch

from ..policy.time_model import DeviceSpeed
from .attention.row_attention import row_attention
from .locate import Located
from .tokens.cut import Plan
from .tokens.layout import Layout
from .tokens.present import Tokens
from .tokens.sizes import Sizes

# A prompt that has almost nothing to compute.
VISUAL, TEXT = 48, 16
ROUNDS = 15
# Tokens in the product of matrices that shows the FLOP/s.
MANY = 1024

_measured: dict[Any, DeviceSpeed] = {}


def device_speed(located: Located) -> DeviceSpeed:
    """Seconds for the parts of this model's prefill on its device; measured at the first call."""
    layer = located.layers[0]
    weight = max(layer.parameters(), key=torch.Tensor.numel)
    device = weight.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    key = name, weight.dtype, type(layer), tuple(weight.shape), torch.get_num_threads()
    if key not in _measured:
        with torch.inference_mode():
            _measured[key] = _measure(located, weight)
    return _measured[key]


def _measure(located: Located, weight: torch.Tensor) -> DeviceSpeed:
    device, dtype = weight.device, weight.dtype
    size = located.text.config.hidden_size
    hidden = _numbers(1, VISUAL + TEXT, size, device=device).to(dtype)
    positions = torch.arange(VISUAL + TEXT, device=device)[None]
    heads = max(1, getattr(located.text.config, "num_attention_heads", 1))
    query = _numbers(1, heads, VISUAL + TEXT, max(1, size // heads), device=device).to(dtype)
    visual = np.arange(VISUAL + TEXT)[None] < VISUAL
    tokens = Tokens.of(Layout(np.ones_like(visual), visual), device)
    source = torch.arange(VISUAL + TEXT // 2, device=device)
    sizes = Sizes(tokens, None, np.array([[VISUAL // 2]]), may_pack=False)

    def rank() -> None:
        seen = row_attention(query[:, :, VISUAL:], query, None)[..., :VISUAL]
        order = seen.mean(dim=(1, 2)).sort(dim=1, descending=True, stable=True).indices
        Plan(tokens, None, tokens.ranks(order), sizes, range(1)).cuts([1])

    many = _numbers(MANY, weight.shape[-1], device=device).to(dtype)
    product = _seconds(lambda: torch.nn.functional.linear(many, weight), device, rounds=3)
    return DeviceSpeed(
        layer_launch_s=_seconds(_layer(located, hidden, positions), device),
        cut_launch_s=_seconds(lambda: hidden.index_select(1, source), device),
        ranking_launch_s=_seconds(rank, device),
        flops_per_s=2 * MANY * weight.numel() / product,
    )


def _numbers(*shape: int, device: torch.device) -> torch.Tensor:
    """Some numbers, without drawing from the user's generator."""
    return torch.arange(math.prod(shape), device=device).view(shape).float().cos()


def _layer(located: Located, hidden: torch.Tensor, positions: torch.Tensor) -> Callable[[], Any]:
    """Runs the first decoder layer, without the hooks on it."""
    layer, text = located.layers[0], located.text
    given: dict[str, Any] = {"attention_mask": None, "position_ids": positions}
    if (rotary := getattr(text, "rotary_emb", None)) is not None:
        try:
            given["position_embeddings"] = rotary(hidden, positions)
        except (TypeError, ValueError, IndexError, RuntimeError):
            # Some count positions in several dimensions, or by the type of layer.
            given["position_embeddings"] = _any_rotary(rotary, text, hidden, positions)
    return lambda: layer.forward(hidden, **given)


def _any_rotary(rotary: Any, text: Any, hidden: torch.Tensor, positions: torch.Tensor) -> Any:
    kinds = getattr(text.config, "layer_types", None) or [None]
    try:
        return rotary(hidden, positions[None].expand(3, -1, -1))
    except (TypeError, ValueError, IndexError, RuntimeError):
        return rotary(hidden, positions, kinds[0])


def _seconds(run: Callable[[], Any], device: torch.device, rounds: int = ROUNDS) -> float:
    """Median seconds of one run. On a GPU it is what the host needs to queue it, or the GPU to do it."""
    repeats, times = 10 if rounds == ROUNDS else 1, []
    for _ in range(rounds + 1):
        _wait(device)
        start = time.perf_counter()
        for _ in range(repeats):
            run()
        _wait(device)
        times.append((time.perf_counter() - start) / repeats)
    # The first run warms up.
    return max(median(times[1:]), 1e-9)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
