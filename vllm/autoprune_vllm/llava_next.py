"""LLaVA-NeXT with fewer visual tokens: a budget is for a picture with all of its tiles."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from vllm.model_executor.models.llava import LlavaDummyInputsBuilder
from vllm.model_executor.models.llava_next import (
    LlavaNextForConditionalGeneration,
    LlavaNextMultiModalProcessor,
    LlavaNextProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY

from .processing import PrunedInfo, PrunedProcessor
from .pruning import PrunesPlainRope
from .weights import with_clip_names


class Info(PrunedInfo, LlavaNextProcessingInfo):
    """Pictures of LLaVA-NeXT."""


class Processor(PrunedProcessor, LlavaNextMultiModalProcessor):
    """Prompts of LLaVA-NeXT."""


@MULTIMODAL_REGISTRY.register_processor(Processor, info=Info, dummy_inputs=LlavaDummyInputsBuilder)
class AutoPruneLlavaNext(PrunesPlainRope, LlavaNextForConditionalGeneration):
    """vLLM's LLaVA-NeXT, pruned."""

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        return super().load_weights(with_clip_names(weights))
