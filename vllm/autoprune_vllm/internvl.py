"""InternVL with fewer visual tokens: a budget is for a picture with all of its tiles."""

from __future__ import annotations

from vllm.model_executor.models.interns1 import (
    InternS1DummyInputsBuilder,
    InternS1ForConditionalGeneration,
    InternS1MultiModalProcessor,
    InternS1ProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY

from .processing import PrunedInfo, PrunedProcessor
from .pruning import PrunesPlainRope


class Info(PrunedInfo, InternS1ProcessingInfo):
    """Pictures of InternVL."""


class Processor(PrunedProcessor, InternS1MultiModalProcessor):
    """Prompts of InternVL."""


@MULTIMODAL_REGISTRY.register_processor(
    Processor, info=Info, dummy_inputs=InternS1DummyInputsBuilder
)
class AutoPruneInternVL(PrunesPlainRope, InternS1ForConditionalGeneration):
    """vLLM's class for InternVL, pruned."""
