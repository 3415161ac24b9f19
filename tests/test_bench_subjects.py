"""Built-in configurations take the prompts that are made for them."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from autoprune import AutoPrune, Budget
from autoprune.bench import subjects

CPU = torch.device("cpu")


@pytest.fixture
def shrunk(monkeypatch):
    """The table with every model three layers deep and narrow; pictures and prompts stay."""

    def narrow(row):
        config = row.config()
        text, vision = config.text_config, config.vision_config
        text.num_hidden_layers = 3
        text.hidden_size, text.intermediate_size = 64, 96
        text.num_attention_heads, text.num_key_value_heads, text.head_dim = 2, 1, 32
        vision.hidden_size, vision.intermediate_size = 32, 32
        if hasattr(vision, "depth"):
            text.layer_types = text.layer_types[:3]
            text.rope_parameters["mrope_section"] = [4, 6, 6]
            vision.depth, vision.num_heads, vision.out_hidden_size = 2, 2, 64
            vision.fullatt_block_indexes = [1]
        else:
            vision.num_hidden_layers, vision.num_attention_heads = 2, 2
        return config

    for name, row in subjects.CONFIGURATIONS.items():
        small = dataclasses.replace(row, config=lambda row=row: narrow(row))
        monkeypatch.setitem(subjects.CONFIGURATIONS, name, small)


@pytest.mark.parametrize(
    ("name", "images"), [*((name, 1) for name in subjects.CONFIGURATIONS), ("small", 2)]
)
def test_prompts_of_a_configuration_fit_its_model(shrunk, name, images):
    subject = subjects.build(name, 10, images, CPU, torch.float32)
    with torch.inference_mode(), AutoPrune(Budget.ratio(0.5), mi_layer=0)(subject.model) as trace:
        output = subject.model(**subject.prompts(2), logits_to_keep=1)
    assert output.logits.isfinite().all()
    visual = images * subjects.CONFIGURATIONS[name].visual_tokens
    assert [(s.num_visual, s.num_text) for s in trace.samples] == [(visual, 10)] * 2
    assert output.logits.shape[0] == 2


def test_the_same_seed_gives_the_same_model_and_prompts(shrunk):
    first, second = (subjects.build("small", 8, 1, CPU, torch.float32) for _ in range(2))
    assert all(map(torch.equal, first.model.parameters(), second.model.parameters()))
    assert all(map(torch.equal, first.prompts(1).values(), second.prompts(1).values()))


def test_prompts_of_a_batch_differ_and_text_stands_on_both_sides(shrunk):
    prompts = subjects.build("small", 9, 1, CPU, torch.float32).prompts(2)
    ids, pixels = prompts["input_ids"], prompts["pixel_values"]
    assert not torch.equal(ids[0], ids[1]) and not torch.equal(pixels[0], pixels[1])
    visual = (ids[0] == 4096 - 64).nonzero().flatten().tolist()
    assert visual == list(range(4, 4 + 576))


def test_building_a_model_leaves_the_random_numbers_of_others_alone(shrunk):
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    subjects.build("small", 8, 1, CPU, torch.float32)
    assert torch.equal(torch.rand(1), expected)


def test_the_reference_configuration():
    config = subjects.CONFIGURATIONS["small"].config().text_config
    assert (config.num_hidden_layers, config.hidden_size, config.head_dim) == (12, 512, 64)
    assert config.intermediate_size == 1376
