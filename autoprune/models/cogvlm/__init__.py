"""CogVLM-17B for transformers 5: see docs/cogvlm.md."""

from __future__ import annotations

from .configuration import CogVLMConfig, CogVLMVisionConfig
from .model import CogVLMForConditionalGeneration, CogVLMModel
from .processing import CogVLMProcessor

__all__ = [
    "CogVLMConfig",
    "CogVLMForConditionalGeneration",
    "CogVLMModel",
    "CogVLMProcessor",
    "CogVLMVisionConfig",
    "register",
]


def register() -> None:
    """Make transformers' Auto classes know CogVLM. Calling it again does nothing."""
    from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

    AutoConfig.register("cogvlm", CogVLMConfig, exist_ok=True)
    AutoModelForImageTextToText.register(
        CogVLMConfig, CogVLMForConditionalGeneration, exist_ok=True
    )
    AutoProcessor.register(CogVLMConfig, CogVLMProcessor, exist_ok=True)
