"""The embedded model: LLaVA in small, made of transformers' own classes."""

from __future__ import annotations

from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerBase,
)

from autoprune.tiny.vocabulary import GRID, IMAGE_SIZE, PATCH_SIZE

VISUAL_TOKENS = GRID * GRID


def vision_config(layers: int = 5) -> CLIPVisionConfig:
    """The vision tower: width 128, 12x12 patches of 8 pixels."""
    return CLIPVisionConfig(
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=layers,
        num_attention_heads=4,
        image_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
        hidden_act="gelu",
        projection_dim=128,
    )


def llava_config(
    tokenizer: PreTrainedTokenizerBase, layers: int = 16, vision_layers: int = 5
) -> LlavaConfig:
    """LLaVA over that tower: 144 visual tokens into a Llama decoder of width 128.

    The decoder reads the tower's last hidden states (`vision_feature_layer` -1), the ones that
    the tower's training labels.
    """
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=320,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=2048,
        initializer_range=0.05,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlavaConfig(
        vision_config=vision_config(vision_layers),
        text_config=text,
        image_token_id=tokenizer.convert_tokens_to_ids(tokenizer.image_token),
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        image_seq_length=VISUAL_TOKENS,
        projector_hidden_act="gelu",
        tie_word_embeddings=True,
    )


def build_model(
    tokenizer: PreTrainedTokenizerBase, layers: int = 16, vision_layers: int = 5
) -> LlavaForConditionalGeneration:
    """The model with fresh weights."""
    return LlavaForConditionalGeneration(llava_config(tokenizer, layers, vision_layers))
