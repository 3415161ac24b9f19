"""Qwen2.5-VL with fewer visual tokens."""

from __future__ import annotations

from vllm.model_executor.models.qwen2_5_vl import (
    Qwen2_5_VLDummyInputsBuilder,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLMultiModalProcessor,
    Qwen2_5_VLProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY

from .grid_places import PrunesGrids
from .processing import PrunedInfo, PrunedProcessor


class Info(PrunedInfo, Qwen2_5_VLProcessingInfo):
    """Pictures of Qwen2.5-VL."""


class Processor(PrunedProcessor, Qwen2_5_VLMultiModalProcessor):
    """Prompts of Qwen2.5-VL."""


@MULTIMODAL_REGISTRY.register_processor(
    Processor, info=Info, dummy_inputs=Qwen2_5_VLDummyInputsBuilder
)
class AutoPruneQwen2_5_VL(PrunesGrids, Qwen2_5_VLForConditionalGeneration):
    """vLLM's Qwen2.5-VL, pruned."""
