"""CogVLM-17B: a Llama decoder with visual experts behind an EVA tower (Wang et al. 2023, arXiv:2311.03079).

Written for transformers' base classes from the published description; no code of the authors is in it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    BaseModelOutputWithPooling,
    CausalLMOutputWithPast,
)
from transformers.utils import can_return_tuple

from ...engine.cache.argument import cache_of
from .configuration import CogVLMConfig
from .decoder import CogVLMTextModel
from .pretrained import CogVLMPreTrainedModel, cache_in, named
from .prompt_tokens import PictureTokens
from .vision import CogVLMProjector, CogVLMVisionModel

# On a cache, int [batch]: by how much the positions of what follows fall behind its columns.
SHARED = "shared_positions"


class CogVLMModel(CogVLMPreTrainedModel):
    """The model without its language head."""

    def __init__(self, config: CogVLMConfig):
        super().__init__(config)
        hidden = config.text_config.hidden_size
        self.vision_tower = CogVLMVisionModel(config.vision_config)
        self.projector = CogVLMProjector(config)
        self.boi = nn.Parameter(torch.zeros(1, 1, hidden))
        self.eoi = nn.Parameter(torch.zeros(1, 1, hidden))
        self.language_model = CogVLMTextModel(config.text_config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.embed_tokens = value

    @can_return_tuple
    def get_image_features(self, pixel_values: Tensor, **kwargs: Any) -> BaseModelOutputWithPooling:
        """The patches of each picture as the decoder sees them, without boi and eoi.

        Args:
            pixel_values: [pictures, 3, height, width].

        Returns:
            `pooler_output`: for each picture [patches, hidden].
        """
        output = self.vision_tower(pixel_values, **kwargs)
        output.pooler_output = list(self.projector(output.last_hidden_state[:, 1:]))
        return output

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        mm_encoder_outputs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Hidden states of the decoder, [batch, length, hidden].

        Args:
            input_ids: int [batch, length]; a picture is boi, its patches and eoi.
            pixel_values: [pictures, 3, height, width], in the order of the prompts.
            position_ids: int [batch, length]; by default those of CogVLM, where all patches of a picture have
                one.
            cache, past_key_values: one cache, by the name of either release of transformers.
            inputs_embeds: in place of the ids, of text only, as nothing would tell which token is a patch.
            mm_encoder_outputs: under "image" what `get_image_features` returned, in place of the pixels.
        """
        cache = past_key_values if cache is None else cache
        encoded = (mm_encoder_outputs or {}).get("image")
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("pass either input_ids or inputs_embeds to CogVLM")
        if pixel_values is not None:
            if encoded is not None:
                raise ValueError("pass either pixel_values or mm_encoder_outputs, not both")
            encoded = self.get_image_features(pixel_values, return_dict=True)
        pictures = None
        if input_ids is not None:
            pictures, inputs_embeds = self._embed(input_ids, encoded)
        elif encoded is not None:
            raise ValueError("pictures need input_ids, which say where their patches are")
        assert inputs_embeds is not None
        places, shared = _positions(pictures, inputs_embeds, attention_mask, position_ids, cache)
        output = self.language_model(
            inputs_embeds=inputs_embeds,
            position_ids=places,
            vision_expert=None if pictures is None else pictures.vision_expert,
            attention_mask=attention_mask,
            cache=cache,
            **kwargs,
        )
        filled = cache_in(output)
        if filled is not None and shared is not None:
            setattr(filled, SHARED, shared)
        return output

    def _embed(self, ids: Tensor, encoded: Any) -> tuple[PictureTokens | None, Tensor]:
        """Where the pictures are, None if nowhere; and the embeddings of words and pictures."""
        embed = self.get_input_embeddings()
        # A single id continues a prompt. One of a picture is beyond the vocabulary, and is not embedded.
        if ids.shape[1] == 1:
            return None, embed(ids)
        features = [] if encoded is None else list(encoded.pooler_output)
        pictures = PictureTokens.of(ids, self.config)
        if not pictures.fit(sum(map(len, features))):
            return None, embed(ids)
        embeds = embed(ids.masked_fill(pictures.visual, 0))
        for place, vector in ((pictures.boi, self.boi), (pictures.eoi, self.eoi)):
            embeds = torch.where(place[..., None], vector.to(embeds), embeds)
        if features:
            patches = torch.cat(features).to(embeds)
            embeds = embeds.masked_scatter(pictures.patch[..., None], patches)
        return pictures, embeds


def _positions(
    pictures: PictureTokens | None,
    embeds: Tensor,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    cache: Cache | None,
) -> tuple[Tensor, Tensor | None]:
    """Position ids, int [batch or 1, length], and what to note on the cache for those of later tokens.

    Args:
        embeds: [batch, length, hidden], of the new tokens.
        attention_mask: of the cached ones, too. Only one of two dimensions says what is padding.
        position_ids: if they are given, they stay.
    """
    batch, length = embeds.shape[:2]
    if position_ids is not None and length == 1:
        return position_ids, None
    past = 0 if cache is None else cache.get_seq_length()
    # A compiled step continues a prompt, and must not look at the length.
    is_first = cache is None or not (torch.compiler.is_compiling() or past)
    shared = _shared(None if is_first else cache, batch, embeds.device)[:, None]
    if pictures is not None:
        shared = shared + pictures.shares.long().cumsum(dim=1)
    if position_ids is None:
        if attention_mask is not None and attention_mask.ndim == 2:
            order = attention_mask.long().cumsum(dim=1)[:, -length:] - 1
        else:
            order = past + torch.arange(length, device=embeds.device)[None]
        position_ids = (order - shared).clamp(min=0)
    return position_ids, shared[:, -1] if is_first or length > 1 else None


def _shared(cache: Any, batch: int, device: torch.device) -> Tensor:
    """What is noted on a cache, for each of `batch` prompts, which may be copies."""
    noted = getattr(cache, SHARED, None)
    if noted is None:
        return torch.zeros(batch, dtype=torch.long, device=device)
    return noted.to(device).repeat_interleave(batch // len(noted))


class CogVLMForConditionalGeneration(CogVLMPreTrainedModel, GenerationMixin):
    """CogVLM with its language head."""

    def __init__(self, config: CogVLMConfig):
        super().__init__(config)
        text = config.text_config
        self.model = CogVLMModel(config)
        self.lm_head = nn.Linear(text.hidden_size, text.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def get_image_features(self, pixel_values: Tensor, **kwargs: Any) -> BaseModelOutputWithPooling:
        return self.model.get_image_features(pixel_values, **kwargs)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        mm_encoder_outputs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits [batch, length, vocabulary]; arguments as for `CogVLMModel`.

        Args:
            labels: int [batch, length], -100 where nothing is to be learned, as at pictures.
            logits_to_keep: how many of the last rows, 0 for all; or which.
        """
        output = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=past_key_values if cache is None else cache,
            inputs_embeds=inputs_embeds,
            mm_encoder_outputs=mm_encoder_outputs,
            return_dict=True,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(output.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            size = self.config.text_config.vocab_size
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=size)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=output.hidden_states,
            attentions=output.attentions,
            **named(cache_in(output)),
        )

    def _prepare_position_ids_for_generation(
        self, inputs_tensor: Tensor, model_kwargs: dict[str, Any]
    ) -> Tensor:
        """transformers' positions of a prompt, less what its patches share."""
        positions = super()._prepare_position_ids_for_generation(inputs_tensor, model_kwargs)
        ids = model_kwargs.get("input_ids")
        ids = inputs_tensor if ids is None or ids.shape[1] == 0 else ids
        if ids.ndim != 2 or ids.is_floating_point():
            return positions
        shared = PictureTokens.of(ids, self.config).shares.long().cumsum(dim=1)
        if (cached := positions.shape[1] - ids.shape[1]) > 0:
            # Only the new tokens came; the cache knows of the others.
            shared = shared + _shared(cache_of(model_kwargs), len(ids), ids.device)[:, None]
            shared = nn.functional.pad(shared, (cached, 0))
        return (positions - shared).clamp(min=0)
