"""CogVLM's decoder: Llama's, with every projection twice: once for patches, once for text."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import (
    LlamaMLP,
    LlamaRotaryEmbedding,
    apply_rotary_pos_emb,
    eager_attention_forward,
)
from transformers.utils.output_capturing import capture_outputs

from .pretrained import CogVLMPreTrainedModel, named

# Cosine and sine of the positions, then 1 where a token goes to the vision experts: [batch, length, head dim]
# each. The third in the form of the others follows the tokens wherever cosine and sine do, through every cut.
PositionEmbeddings = tuple[Tensor, ...]


@dataclass(frozen=True)
class Route:
    """Which tokens go to which experts.

    language, vision: int [tokens], which of all prompts' tokens in one row.
    back: int [tokens], where each token is among those of language and vision, in this order.
    """

    language: Tensor
    vision: Tensor
    back: Tensor

    @classmethod
    def of(cls, embeddings: PositionEmbeddings, length: int) -> Route | None:
        """None if all go to the language experts, as a single new token does."""
        if len(embeddings) < 3 or length == 1:
            return None
        is_vision = embeddings[2][..., 0].flatten() > 0
        number = int(is_vision.sum())
        if number == 0:
            return None
        order = is_vision.to(torch.uint8).argsort(stable=True)
        language, vision = order[: len(order) - number], order[len(order) - number :]
        return cls(language, vision, order.argsort())


class Experts(nn.Module):
    """A module for patches and one for text; every token goes through one of them."""

    def __init__(self, make: Callable[[], nn.Module]):
        super().__init__()
        self.vision, self.language = make(), make()

    def forward(self, hidden_states: Tensor, route: Route | None) -> Tensor:
        if route is None:
            return self.language(hidden_states)
        tokens = hidden_states.flatten(0, 1)
        parts = [self.language(tokens[route.language]), self.vision(tokens[route.vision])]
        return torch.cat(parts)[route.back].unflatten(0, hidden_states.shape[:2])


class CogVLMRMSNorm(nn.Module):
    """Root mean square normalisation, cast down behind the weight (Llama casts in front of it)."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, hidden_states: Tensor) -> Tensor:
        wide = hidden_states.float()
        normal = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + self.eps)
        return (self.weight * normal).to(hidden_states.dtype)


class CogVLMAttention(nn.Module):
    """Causal attention of all tokens to all before them, patches included."""

    def __init__(self, config: LlamaConfig, layer_idx: int):
        super().__init__()
        size = config.hidden_size
        self.config, self.layer_idx = config, layer_idx
        self.head_dim = size // config.num_attention_heads
        self.scaling = self.head_dim**-0.5
        self.num_key_value_groups = 1
        self.is_causal = True
        self.query_key_value = Experts(lambda: nn.Linear(size, 3 * size, bias=False))
        self.dense = Experts(lambda: nn.Linear(size, size, bias=False))

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: PositionEmbeddings,
        route: Route | None,
        attention_mask: Tensor | None = None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        parts = self.query_key_value(hidden_states, route).unflatten(-1, (3, -1, self.head_dim))
        query, key, value = (part.transpose(1, 2) for part in parts.unbind(2))
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings[:2])
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        output, weights = attend(
            self, query, key, value, attention_mask, dropout=0.0, scaling=self.scaling, **kwargs
        )
        return self.dense(output.flatten(2), route), weights


class CogVLMDecoderLayer(GradientCheckpointingLayer):
    def __init__(self, config: LlamaConfig, layer_idx: int):
        super().__init__()
        self.self_attn = CogVLMAttention(config, layer_idx)
        self.mlp = Experts(lambda: LlamaMLP(config))
        self.input_layernorm = CogVLMRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = CogVLMRMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: PositionEmbeddings,
        attention_mask: Tensor | None = None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> Tensor:
        route = Route.of(position_embeddings, hidden_states.shape[1])
        attended, _ = self.self_attn(
            self.input_layernorm(hidden_states),
            position_embeddings,
            route,
            attention_mask=attention_mask,
            cache=cache,
            **kwargs,
        )
        hidden_states = hidden_states + attended
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states), route)


class CogVLMTextModel(CogVLMPreTrainedModel):
    """The stack of decoder layers."""

    config_class = LlamaConfig
    input_modalities = ("text",)
    _can_record_outputs: ClassVar[Any] = {
        "hidden_states": CogVLMDecoderLayer,
        "attentions": CogVLMAttention,
    }

    def __init__(self, config: LlamaConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(
            CogVLMDecoderLayer(config, index) for index in range(config.num_hidden_layers)
        )
        self.norm = CogVLMRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(config)
        self.post_init()

    @capture_outputs
    def forward(
        self,
        inputs_embeds: Tensor,
        position_ids: Tensor,
        vision_expert: Tensor | None = None,
        attention_mask: Tensor | None = None,
        cache: Cache | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """The last hidden states.

        Args:
            inputs_embeds: [batch, length, hidden].
            position_ids: int [batch or 1, length]; the patches of a picture share one.
            vision_expert: bool [batch, length], the tokens that go to the vision experts; None for none.
        """
        if cache is None and (self.config.use_cache if use_cache is None else use_cache):
            cache = DynamicCache(config=self.config)
        # Positions are not told: equal ones behind each other would look like packed sequences.
        causal_mask = create_causal_mask(
            config=self.config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=None,
            **named(cache),
        )
        embeddings = self._embeddings(inputs_embeds, position_ids, vision_expert)
        hidden_states = inputs_embeds
        for layer in self.layers:
            hidden_states = layer(
                hidden_states,
                position_embeddings=embeddings,
                attention_mask=causal_mask,
                cache=cache,
                **kwargs,
            )
        return BaseModelOutputWithPast(
            last_hidden_state=self.norm(hidden_states),
            **named(cache),
        )

    def _embeddings(
        self, inputs_embeds: Tensor, position_ids: Tensor, vision_expert: Tensor | None
    ) -> PositionEmbeddings:
        cos, sin = self.rotary_emb(inputs_embeds, position_ids)
        if vision_expert is None:
            return cos, sin
        shape = (*vision_expert.shape, cos.shape[-1])
        routing = vision_expert[..., None].to(cos.dtype).expand(shape)
        return cos.expand(shape), sin.expand(shape), routing
