"""The README's blocks for a model of one's own run as they stand, on tiny models of three families.

The hub's name becomes a folder and the GPU a CPU. The processors are the families' own, without
their part for videos.
"""

from __future__ import annotations

import pytest
from transformers import AutoProcessor

from autoprune import tiny
from tests import processors, zoo
from tests.test_examples import OWN_MODEL

NAME = "llava-hf/llava-1.5-7b-hf"


def run_block(code, name, family, tmp_path, monkeypatch) -> dict:
    """Run code for a model of the hub on a tiny one of the family; returns what it defined."""
    folder = tmp_path / "model"
    zoo.build(family).save_pretrained(folder)
    tiny.draw_scene(3).image.save(tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)

    def load(asked):
        assert asked == str(folder)
        return processors.processor(family)

    monkeypatch.setattr(AutoProcessor, "from_pretrained", load)
    assert code.count(f'"{name}"') == code.count('"cuda"') == 1
    names: dict = {}
    exec(code.replace(f'"{name}"', repr(str(folder))).replace('"cuda"', '"cpu"'), names)
    return names


@pytest.mark.parametrize("family", processors.TOKENS)
def test_the_blocks_for_ones_own_model(family, tmp_path, monkeypatch, capsys):
    names = run_block("\n".join(OWN_MODEL), NAME, family, tmp_path, monkeypatch)
    (sample,) = names["trace"].samples
    assert sum(sample.tokens_per_layer) == round(zoo.LAYERS * sample.num_visual / 4)
    answer, summary, again = capsys.readouterr().out.splitlines()
    assert answer and answer == again
    assert summary.startswith("1 prompt (1 with images): ")


def test_the_block_names_a_model_of_each_of_these_families():
    code = "\n".join(OWN_MODEL)
    for name in (
        "llava-hf/llava-1.5-7b-hf",
        "Qwen/Qwen2.5-VL-7B-Instruct",
        "OpenGVLab/InternVL3-8B-hf",
    ):
        assert name in code
