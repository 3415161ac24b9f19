"""Senna (arxiv.org/abs/2410.22313): LLaVA with a driving adapter, asked about the six cameras of a car.

    python -m autoprune.models.senna CHECKPOINT OUTPUT

converts a checkpoint in the format of its authors' code.
"""

from __future__ import annotations

from .model import SennaConfig, SennaForConditionalGeneration, SennaProjector
from .processor import CAMERAS, LABELS, SennaProcessor, driving_messages

__all__ = [
    "CAMERAS",
    "LABELS",
    "SennaConfig",
    "SennaForConditionalGeneration",
    "SennaProcessor",
    "SennaProjector",
    "driving_messages",
    "register",
]


def register() -> None:
    """Make transformers' Auto classes know Senna."""
    from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

    AutoConfig.register(SennaConfig.model_type, SennaConfig, exist_ok=True)
    AutoModelForImageTextToText.register(SennaConfig, SennaForConditionalGeneration, exist_ok=True)
    AutoProcessor.register(SennaConfig, SennaProcessor, exist_ok=True)
