"""The configuration of CogVLM: a Llama decoder with visual experts behind an EVA tower."""

from __future__ import annotations

from typing import Any, ClassVar

from transformers import LlamaConfig
from transformers.configuration_utils import PreTrainedConfig


class CogVLMVisionConfig(PreTrainedConfig):
    """The tower, by default EVA2-CLIP-E without its last block, for pictures of 490 x 490 pixels."""

    model_type = "cogvlm_vision"
    base_config_key = "vision_config"

    hidden_size: int = 1792
    intermediate_size: int = 15360
    num_hidden_layers: int = 63
    num_attention_heads: int = 16
    num_channels: int = 3
    image_size: int = 490
    patch_size: int = 14
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-6
    initializer_range: float = 0.02

    @property
    def num_patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2


class CogVLMConfig(PreTrainedConfig):
    """CogVLM's two parts, and the ids that stand in a prompt for a picture: boi, the patches, eoi.

    The published model has no such ids. These follow its vocabulary and are never embedded.

    Args:
        text_config: the decoder's sizes; every head has keys and values of its own.
        vision_config: the tower's.
        image_token_id: of each patch.
        boi_token_id, eoi_token_id: of the two learned vectors around the patches.
    """

    model_type = "cogvlm"
    sub_configs: ClassVar[dict[str, Any]] = {
        "text_config": LlamaConfig,
        "vision_config": CogVLMVisionConfig,
    }
    # Pruning asks for it: see `refuse_positions` in the engine.
    patches_share_position = True
    # The tower's first token is CLS, which the decoder does not see.
    vision_feature_select_strategy = "default"

    text_config: dict | PreTrainedConfig | None = None
    vision_config: dict | PreTrainedConfig | None = None
    image_token_id: int = 32000
    boi_token_id: int = 32001
    eoi_token_id: int = 32002
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        self.text_config = _part(LlamaConfig, self.text_config)
        self.vision_config = _part(CogVLMVisionConfig, self.vision_config)
        heads = self.text_config.num_attention_heads
        if self.text_config.num_key_value_heads != heads:
            raise ValueError(
                f"text_config has {self.text_config.num_key_value_heads} key-value heads for {heads} heads; "
                "CogVLM has one for each (CogVLM2, which shares them, is another model)"
            )
        super().__post_init__(**kwargs)


def _part(kind: type[PreTrainedConfig], given: dict | PreTrainedConfig | None) -> Any:
    return given if isinstance(given, PreTrainedConfig) else kind(**(given or {}))
