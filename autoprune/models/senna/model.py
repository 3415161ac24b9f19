"""Senna's network: LLaVA, with an adapter that makes few tokens of a view's many patches."""

from __future__ import annotations

import torch
from torch import nn
from transformers import LlavaConfig, LlavaForConditionalGeneration
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector


class SennaConfig(LlavaConfig):
    """LLaVA's configuration; `image_seq_length` is the number of tokens that the adapter makes of a view."""

    model_type = "senna"

    image_seq_length: int = 128


class SennaProjector(LlavaMultiModalProjector):
    """LLaVA's projector, and behind it the driving adapter.

    The adapter is an MLP over the patches of a view: each token that it makes is a mixture of all of them.
    So no token has a place in the picture, and what the vision tower attends to says nothing of a token.
    """

    def __init__(self, config: SennaConfig):
        super().__init__(config)
        vision, tokens = config.vision_config, config.image_seq_length
        patches = (vision.image_size // vision.patch_size) ** 2
        self.adapter = nn.Sequential(
            nn.Linear(patches, tokens),
            nn.GELU(),
            nn.Linear(tokens, tokens),
            nn.GELU(),
            nn.Linear(tokens, tokens),
        )

    def forward(self, image_features: torch.Tensor) -> torch.Tensor:
        """[views, patches, vision size] -> [views, tokens, hidden size]."""
        projected: torch.Tensor = super().forward(image_features)
        adapted: torch.Tensor = self.adapter(projected.transpose(1, 2))
        return adapted.transpose(1, 2)


class SennaForConditionalGeneration(LlavaForConditionalGeneration):
    """LLaVA with `SennaProjector`. A prompt may hold any number of views; the authors' hold six."""

    config_class = SennaConfig

    def __init__(self, config: SennaConfig):
        super().__init__(config)
        self.model.multi_modal_projector = SennaProjector(config)
