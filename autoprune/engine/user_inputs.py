"""What a caller passes beside a method: checked when it is passed, not in the middle of a forward."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

_MASK = "bool [batch, length], True where a position of the prompt is visual"
_SCORES = "float [batch, N] or [total visual tokens], one score per visual token"


def model_of(given: Any) -> Any:
    """The model itself, where a pipeline of transformers is given."""
    inner = getattr(given, "model", None)
    return inner if isinstance(inner, nn.Module) and not isinstance(given, nn.Module) else given


def checked_mask(mask: Any) -> torch.Tensor | None:
    """`visual_mask` as bool [batch, length].

    Raises:
        ValueError: it is no such thing.
    """
    if mask is None:
        return None
    tensor = _as_tensor(mask, "visual_mask", _MASK)
    if not 1 <= tensor.ndim <= 2 or not tensor.numel():
        raise ValueError(f"visual_mask must be {_MASK}, got shape {list(tensor.shape)}")
    flags = tensor.dtype == torch.bool
    if not flags and (tensor.is_floating_point() or bool(((tensor != 0) & (tensor != 1)).any())):
        raise ValueError(
            f"visual_mask must be {_MASK}, got {tensor.dtype} with other values than 0 and 1; "
            "make it one, such as input_ids == model.config.image_token_id"
        )
    return torch.atleast_2d(tensor.bool())


def checked_scores(scores: Any) -> torch.Tensor | None:
    """`vision_scores` as float32, in any shape; NaN is a token without one.

    Raises:
        ValueError: they are no numbers, or no shares of anything.
    """
    if scores is None:
        return None
    tensor = _as_tensor(scores, "vision_scores", _SCORES)
    if tensor.dtype == torch.bool or tensor.is_complex():
        raise ValueError(f"vision_scores must be {_SCORES}, got {tensor.dtype}")
    if not 1 <= tensor.ndim <= 2 or not tensor.numel():
        raise ValueError(f"vision_scores must be {_SCORES}, got shape {list(tensor.shape)}")
    tensor = tensor.float()
    if bool((tensor < 0).any() | tensor.isinf().any() | tensor.isnan().all()):
        raise ValueError(
            "vision_scores must be finite and 0 or more, as attention is (NaN for a token without a score); "
            "turn logits into shares first, as with softmax"
        )
    return tensor


def _as_tensor(values: Any, name: str, expected: str) -> torch.Tensor:
    try:
        return torch.as_tensor(values).detach()
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(
            f"{name} must be {expected}, got {_short(values)} of type {type(values).__name__}"
        ) from None


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 40 else f"{text[:36]} ..."
