"""CogVLM's tower (EVA2-CLIP-E), and the projector from its patches to the decoder."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import eager_attention_forward
from transformers.utils.output_capturing import capture_outputs

from .configuration import CogVLMConfig, CogVLMVisionConfig
from .pretrained import CogVLMPreTrainedModel


class CogVLMVisionAttention(nn.Module):
    """Every token looks at every other, CLS included."""

    def __init__(self, config: CogVLMVisionConfig):
        super().__init__()
        self.config = config
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.scaling = self.head_dim**-0.5
        self.num_key_value_groups = 1
        self.is_causal = False
        self.query_key_value = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        parts = self.query_key_value(hidden_states).unflatten(-1, (3, -1, self.head_dim))
        query, key, value = (part.transpose(1, 2) for part in parts.unbind(2))
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        output, weights = attend(
            self, query, key, value, None, dropout=0.0, scaling=self.scaling, **kwargs
        )
        return self.dense(output.flatten(2)), weights


class CogVLMVisionMLP(nn.Module):
    def __init__(self, config: CogVLMVisionConfig):
        super().__init__()
        self.act_fn = ACT2FN[config.hidden_act]
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.fc2(self.act_fn(self.fc1(hidden_states)))


class CogVLMVisionLayer(GradientCheckpointingLayer):
    """One block. Unlike in other towers, what is normalised is the output of attention and MLP."""

    def __init__(self, config: CogVLMVisionConfig):
        super().__init__()
        size, eps = config.hidden_size, config.layer_norm_eps
        self.attention = CogVLMVisionAttention(config)
        self.input_layernorm = nn.LayerNorm(size, eps=eps)
        self.mlp = CogVLMVisionMLP(config)
        self.post_attention_layernorm = nn.LayerNorm(size, eps=eps)

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        attended, _ = self.attention(hidden_states, **kwargs)
        hidden_states = hidden_states + self.input_layernorm(attended)
        return hidden_states + self.post_attention_layernorm(self.mlp(hidden_states))


class CogVLMVisionModel(CogVLMPreTrainedModel):
    """The tower: [pictures, 3, height, width] -> [pictures, 1 + patches, hidden], CLS first."""

    config_class = CogVLMVisionConfig
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    _can_record_outputs: ClassVar[Any] = {
        "hidden_states": CogVLMVisionLayer,
        "attentions": CogVLMVisionAttention,
    }

    def __init__(self, config: CogVLMVisionConfig):
        super().__init__(config)
        size = config.hidden_size
        self.patch_embedding = nn.Conv2d(
            config.num_channels, size, config.patch_size, stride=config.patch_size
        )
        self.class_embedding = nn.Parameter(torch.zeros(1, size))
        self.position_embedding = nn.Embedding(1 + config.num_patches, size)
        self.layers = nn.ModuleList(
            CogVLMVisionLayer(config) for _ in range(config.num_hidden_layers)
        )
        self.post_init()

    @capture_outputs
    def forward(self, pixel_values: Tensor, **kwargs: Any) -> BaseModelOutputWithPooling:
        size = self.config.image_size
        if pixel_values.ndim != 4 or pixel_values.shape[2:] != (size, size):
            raise ValueError(
                f"pixel_values has shape {list(pixel_values.shape)}, but this tower takes [pictures, "
                f"{self.config.num_channels}, {size}, {size}]; prepare pictures with CogVLMProcessor"
            )
        pixel_values = pixel_values.to(self.patch_embedding.weight)
        patches = self.patch_embedding(pixel_values).flatten(2).transpose(1, 2)
        first = self.class_embedding.expand(len(patches), 1, -1)
        hidden_states = torch.cat([first, patches], dim=1) + self.position_embedding.weight
        for layer in self.layers:
            hidden_states = layer(hidden_states, **kwargs)
        return BaseModelOutputWithPooling(last_hidden_state=hidden_states)


class CogVLMProjector(nn.Module):
    """From the tower's patches to the decoder's hidden size, each patch by itself."""

    def __init__(self, config: CogVLMConfig):
        super().__init__()
        hidden, inner = config.text_config.hidden_size, config.text_config.intermediate_size
        self.linear = nn.Linear(config.vision_config.hidden_size, hidden, bias=False)
        self.norm = nn.LayerNorm(hidden)
        self.gate_proj = nn.Linear(hidden, inner, bias=False)
        self.up_proj = nn.Linear(hidden, inner, bias=False)
        self.down_proj = nn.Linear(inner, hidden, bias=False)

    def forward(self, patches: Tensor) -> Tensor:
        hidden_states = F.gelu(self.norm(self.linear(patches)))
        return self.down_proj(F.silu(self.gate_proj(hidden_states)) * self.up_proj(hidden_states))
