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

NAME = '"llava-hf/llava-1.5-7b-hf"'


@pytest.mark.parametrize("family", processors.TOKENS)
def test_the_blocks_for_ones_own_model(family, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "model"
    zoo.build(family).save_pretrained(folder)
    tiny.draw_scene(3).image.save(tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)

    def load(name):
        assert name == str(folder)
        return processors.processor(family)

    monkeypatch.setattr(AutoProcessor, "from_pretrained", load)
    code = "\n".join(OWN_MODEL)
    assert code.count(NAME) == code.count('"cuda"') == 1
    names: dict = {}
    capsys.readouterr()
    exec(code.replace(NAME, repr(str(folder))).replace('"cuda"', '"cpu"'), names)
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
