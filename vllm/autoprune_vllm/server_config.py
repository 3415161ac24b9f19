"""What the plugin checks and sets in vLLM's configuration, before a model is made."""

from __future__ import annotations

from typing import Any

from vllm.model_executor.models.config import VerifyAndUpdateConfig

from .families import family_of
from .settings import KEY, Settings

# The rotary table of a model is made for so many times its longest prompt, where that changes no value: pruned
# prompts are shorter than their positions.
ROOM = 4


class PrunedConfig(VerifyAndUpdateConfig):
    """vLLM asks it when the configuration of a pruned model is complete."""

    @staticmethod
    def verify_and_update_model_config(model_config: Any) -> None:
        """Check the settings, and have a model of plain rotary positions asked for its positions.

        vLLM asks models of M-RoPE alone, and finds them by this entry. The decoder's own configuration, a
        level below, stays as it is, and so do its rotary embeddings.
        """
        config = model_config.hf_config
        family, settings = family_of(config), Settings.of(getattr(config, KEY, {}))
        if not family.plain_rope and settings.method.positions != "original":
            raise ValueError(
                f"autoprune: {family.name} keeps original positions, got positions="
                f"{settings.method.positions!r}; leave it out"
            )
        if family.plain_rope and settings.method.positions == "original":
            config.rope_parameters = {"rope_type": "default", "mrope_section": [1, 1, 1]}

    @staticmethod
    def verify_and_update_config(vllm_config: Any) -> None:
        """Refuse what would answer wrongly.

        Raises:
            ValueError: an option of vLLM that was not made to work with pruning.
        """
        parallel, compilation = vllm_config.parallel_config, vllm_config.compilation_config
        pictures = vllm_config.model_config.multimodal_config
        family = family_of(vllm_config.model_config.hf_config)
        refused = {
            "tensor parallelism (tensor_parallel_size > 1)": parallel.tensor_parallel_size > 1,
            "pipeline parallelism (pipeline_parallel_size > 1)": parallel.pipeline_parallel_size
            > 1,
            "speculative decoding": vllm_config.speculative_config is not None,
            "a compiled vision tower (compile_mm_encoder)": getattr(
                compilation, "compile_mm_encoder", False
            ),
            "CUDA graphs of the vision tower (cudagraph_mm_encoder)": getattr(
                compilation, "cudagraph_mm_encoder", False
            ),
            "embeddings instead of pictures (enable_mm_embeds)": pictures.enable_mm_embeds,
            # The model itself sets a rate of nearly 0, see `PrunesPictures`.
            "pruned videos (video_pruning_rate)": (pictures.video_pruning_rate or 0) > 1e-6,
            "LoRA adapters": vllm_config.lora_config is not None,
        }
        for what, on in refused.items():
            if on:
                raise ValueError(
                    f"autoprune-vllm prunes {family.name} without {what}: that was not tried and could answer "
                    "wrongly; switch it off, or serve the model unpruned"
                )


def most_positions(config: Any) -> int:
    """Positions that the decoder's rotary table has, from its configuration."""
    text = config.get_text_config()
    return text.max_position_embeddings * (ROOM if has_plain_table(text) else 1)


def has_plain_table(text: Any) -> bool:
    """Whether the decoder's rotary table can be made longer without changing a value of it."""
    rope = getattr(text, "rope_parameters", None) or {}
    return rope.get("rope_type", "default") == "default"
