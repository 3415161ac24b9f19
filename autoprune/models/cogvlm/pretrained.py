"""What the parts of CogVLM have in common as models of transformers."""

from __future__ import annotations

import inspect
from typing import Any, ClassVar

import torch
from transformers.cache_utils import Cache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_utils import PreTrainedModel

from ...engine.cache.argument import NAMES
from .configuration import CogVLMConfig

# As this release of transformers calls the argument that holds the cache.
_CACHE = next(name for name in NAMES if name in inspect.signature(create_causal_mask).parameters)


def named(cache: Cache | None) -> dict[str, Any]:
    """The cache as an argument of transformers' functions and outputs."""
    return {_CACHE: cache}


def cache_in(output: Any) -> Cache | None:
    """The cache in a model's output."""
    return getattr(output, _CACHE)


class CogVLMPreTrainedModel(PreTrainedModel):
    """Base of the decoder, the tower and the models that hold both."""

    config_class: Any = CogVLMConfig
    base_model_prefix = "model"
    input_modalities: Any = ("image", "text")
    supports_gradient_checkpointing = True
    _no_split_modules: ClassVar[Any] = ["CogVLMDecoderLayer", "CogVLMVisionLayer"]
    _skip_keys_device_placement: ClassVar[Any] = ["cache", "past_key_values"]
    _supports_sdpa = True
    _supports_attention_backend = True

    @torch.no_grad()
    def _init_weights(self, module: Any) -> None:
        super()._init_weights(module)
        for name in ("class_embedding", "boi", "eoi"):
            parameter = module._parameters.get(name)
            if parameter is not None and not getattr(parameter, "_is_hf_initialized", False):
                parameter.zero_()
