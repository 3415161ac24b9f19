"""Without the override a model is vLLM's own, and the plugin changes nothing about it."""

from __future__ import annotations

import shutil

import pytest
from equality import Ask, Reference, answers, generate, model_of
from safetensors.torch import load_file, save_file

from autoprune import tiny
from autoprune_vllm.weights import with_clip_names


@pytest.fixture(scope="module")
def stock_folder(tmp_path_factory):
    """The embedded model, with the names of weights that vLLM's own class knows."""
    folder = tmp_path_factory.mktemp("stock") / "model"
    shutil.copytree(tiny.path(), folder)
    weights = load_file(folder / "model.safetensors")
    save_file(
        dict(with_clip_names(weights.items())), folder / "model.safetensors", {"format": "pt"}
    )
    return folder


@pytest.fixture(scope="module")
def engine(stock_folder, start_engine):
    return start_engine(stock_folder)


def test_the_class_is_vllms_own(engine):
    model = type(model_of(engine))
    assert model.__module__ == "vllm.model_executor.models.llava"
    assert model.__name__ == "LlavaForConditionalGeneration"
    assert not engine.llm_engine.model_config.uses_mrope


def test_answers_are_those_of_transformers(engine):
    reference = Reference(tiny.path())
    asks = []
    for seed in range(4):
        scene = tiny.draw_scene(seed=seed)
        asks += [Ask(reference.text(q.text), [scene.image]) for q in tiny.ask(scene, seed)[:3]]
    assert answers(engine, asks) == [reference.answer(ask, "") for ask in asks]


def test_a_budget_is_nothing_that_it_knows(engine):
    scene = tiny.draw_scene(seed=1)
    text = Reference(tiny.path()).text("what color is the circle ?")
    (output,) = generate(engine, [Ask(text, [scene.image])])
    assert len(output.prompt_token_ids) > 144
