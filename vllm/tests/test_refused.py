"""What could answer wrongly is refused when a server starts, with one sentence."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from transformers import LlavaConfig, Qwen2_5_VLConfig

from autoprune_vllm.server_config import PrunedConfig, most_positions


def server(config=None, **changes):
    """A configuration of vLLM, as far as it is looked at."""
    parallel = {"tensor_parallel_size": 1, "pipeline_parallel_size": 1}
    compilation = {"compile_mm_encoder": False, "cudagraph_mm_encoder": False}
    pictures = {"enable_mm_embeds": False, "video_pruning_rate": None}
    others = {"speculative_config": None, "lora_config": None}
    for group in (parallel, compilation, pictures, others):
        group.update({name: value for name, value in changes.items() if name in group})
    model = SimpleNamespace(
        hf_config=config or LlavaConfig(), multimodal_config=SimpleNamespace(**pictures)
    )
    return SimpleNamespace(
        model_config=model,
        parallel_config=SimpleNamespace(**parallel),
        compilation_config=SimpleNamespace(**compilation),
        **others,
    )


def test_a_plain_server_is_taken():
    PrunedConfig.verify_and_update_config(server())


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"tensor_parallel_size": 2}, "tensor parallelism"),
        ({"pipeline_parallel_size": 2}, "pipeline parallelism"),
        ({"speculative_config": object()}, "speculative decoding"),
        ({"lora_config": object()}, "LoRA"),
        ({"compile_mm_encoder": True}, "a compiled vision tower"),
        ({"cudagraph_mm_encoder": True}, "CUDA graphs of the vision tower"),
        ({"enable_mm_embeds": True}, "embeddings instead of pictures"),
        ({"video_pruning_rate": 0.5}, "pruned videos"),
    ],
)
def test_what_was_not_tried_is_refused(changes, what):
    with pytest.raises(ValueError, match=f"without {what}.*not tried"):
        PrunedConfig.verify_and_update_config(server(**changes))


def test_grids_keep_their_positions():
    config = Qwen2_5_VLConfig()
    config.autoprune = {"method": "divprune", "options": {"positions": "compacted"}}
    with pytest.raises(ValueError, match=r"Qwen2.5-VL keeps original positions"):
        PrunedConfig.verify_and_update_model_config(server(config).model_config)


def test_the_decoders_own_rotary_embeddings_are_not_touched():
    config = LlavaConfig()
    before = dict(config.text_config.rope_parameters)
    config.autoprune = {"method": "divprune"}
    PrunedConfig.verify_and_update_model_config(server(config).model_config)
    assert config.text_config.rope_parameters == before
    assert "mrope_section" in config.rope_parameters


def test_a_rotary_table_that_depends_on_its_length_is_not_made_longer():
    config = LlavaConfig()
    length = config.text_config.max_position_embeddings
    assert most_positions(config) == 4 * length
    config.text_config.rope_parameters = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    assert most_positions(config) == length
