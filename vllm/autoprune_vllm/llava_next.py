"""LLaVA-NeXT with fewer visual tokens: a budget is for a picture with all of its tiles."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches
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

    def embed_multimodal(self, **kwargs: Any) -> Any:
        """As its base does, without the tiles that pad pictures of one prompt to equally many."""
        pixels, sizes = kwargs.get("pixel_values"), kwargs.get("image_sizes")
        if pixels is not None and sizes is not None:
            kwargs["pixel_values"] = [
                picture[: self._tiles(size)]
                for picture, size in zip(pixels, torch.as_tensor(sizes).tolist(), strict=True)
            ]
        return super().embed_multimodal(**kwargs)

    def _tiles(self, size: list[int]) -> int:
        """Tiles of a picture of this height and width, its small version among them."""
        config = self.config
        return image_size_to_num_patches(
            size, config.image_grid_pinpoints, config.vision_config.image_size
        )

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        return super().load_weights(with_clip_names(weights))
