"""LLaVA-1.5 with fewer visual tokens."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from vllm.model_executor.models.llava import (
    LlavaDummyInputsBuilder,
    LlavaForConditionalGeneration,
    LlavaMultiModalProcessor,
    LlavaProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY

from .processing import PrunedInfo, PrunedProcessor
from .pruning import PrunesPlainRope
from .weights import with_clip_names


class Info(PrunedInfo, LlavaProcessingInfo):
    """Pictures of LLaVA-1.5."""


class Processor(PrunedProcessor, LlavaMultiModalProcessor):
    """Prompts of LLaVA-1.5."""


@MULTIMODAL_REGISTRY.register_processor(Processor, info=Info, dummy_inputs=LlavaDummyInputsBuilder)
class AutoPruneLlava(PrunesPlainRope, LlavaForConditionalGeneration):
    """vLLM's LLaVA, pruned."""

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        return super().load_weights(with_clip_names(weights))
