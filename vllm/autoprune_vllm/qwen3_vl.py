"""Qwen3-VL with fewer visual tokens."""

from __future__ import annotations

from vllm.model_executor.models.qwen3_vl import (
    Qwen3VLDummyInputsBuilder,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMultiModalProcessor,
    Qwen3VLProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY

from .grid_places import PrunesGrids
from .processing import PrunedInfo, PrunedProcessor


class Info(PrunedInfo, Qwen3VLProcessingInfo):
    """Pictures of Qwen3-VL."""


class Processor(PrunedProcessor, Qwen3VLMultiModalProcessor):
    """Prompts of Qwen3-VL."""


@MULTIMODAL_REGISTRY.register_processor(
    Processor, info=Info, dummy_inputs=Qwen3VLDummyInputsBuilder
)
class AutoPruneQwen3VL(PrunesGrids, Qwen3VLForConditionalGeneration):
    """vLLM's Qwen3-VL, pruned."""
