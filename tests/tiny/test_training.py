"""The recipe, shrunken: it learns, resumes exactly, and computes what the model will compute."""

import random

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import nn

from autoprune.tiny.questions import ask
from autoprune.tiny.recipe.architecture import build_model
from autoprune.tiny.recipe.chat import make_processor
from autoprune.tiny.recipe.decoder_training import PREFIX, DecoderTrainer
from autoprune.tiny.recipe.lessons import (
    IGNORE,
    KIND_WEIGHTS,
    LONG_LENGTH,
    SINGLE_LENGTH,
    Layout,
    Teacher,
)
from autoprune.tiny.recipe.optimiser import orthogonalise
from autoprune.tiny.recipe.train import main
from autoprune.tiny.recipe.training import Plan, Stage, train_stage
from autoprune.tiny.recipe.vision_training import encode, to_pixels
from autoprune.tiny.scenes import draw_scene


@pytest.fixture(scope="module")
def small():
    """Processor, two-layer model, trainer and teacher with three short blocks and a long one."""
    torch.manual_seed(0)
    processor = make_processor()
    model = build_model(processor.tokenizer, layers=2, vision_layers=1).eval()
    layout = Layout(singles=3, longs=1)
    trainer = DecoderTrainer(model, processor.tokenizer, layout, compiled=False)
    return processor, model, trainer, Teacher(processor.tokenizer, layout)


def test_training_computes_the_logits_of_the_plain_model(small):
    processor, model, trainer, teacher = small
    scene = draw_scene(1)
    lesson = teacher.lesson([scene.objects], random.Random(0), KIND_WEIGHTS)
    pixels = to_pixels(np.asarray(scene.image)[None])
    with torch.no_grad():
        logits = trainer(pixels, lesson.ids)[0]
    for start, length in ((0, 12), (12, 12), (24, 12), (36, 48)):
        ids = lesson.ids[0, start : start + length]
        ids = ids[ids != processor.tokenizer.pad_token_id]
        text = "<s><|user|><image>" + processor.tokenizer.decode(ids)
        inputs = processor(images=scene.image, text=text, return_tensors="pt")
        with torch.no_grad():
            expected = model(**inputs).logits[0, PREFIX:]
        torch.testing.assert_close(logits[start : start + len(ids)], expected, atol=1e-4, rtol=0)


def test_the_tower_is_trained_on_the_hidden_states_llava_reads(small):
    _, model, _, _ = small
    pixels = to_pixels(np.asarray(draw_scene(1).image)[None])
    with torch.no_grad():
        read = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states
        trained = encode(model.model.vision_tower, pixels)
    layer = model.config.vision_feature_layer
    torch.testing.assert_close(trained, read[layer], atol=1e-5, rtol=0)


def test_only_answers_are_targets(small):
    processor, _, _, teacher = small
    tokenizer = processor.tokenizer
    lesson = teacher.lesson([draw_scene(1).objects], random.Random(0), {"exists": 1.0})
    targets = lesson.targets[0, : 3 * 12]
    taught = {tokenizer.decode([t]) for t in targets.tolist() if t != IGNORE}
    assert taught <= {" yes", " no", "</s>"}
    asked = lesson.ids[0, targets.nonzero()[:, 0][targets != IGNORE]]
    assert tokenizer.convert_tokens_to_ids("<|assistant|>") in asked.tolist()


def test_every_question_fits_its_block(small):
    tokenizer = small[0].tokenizer
    for seed in range(60):
        for question in ask(draw_scene(seed), seed):
            length = len(tokenizer(f" {question.text}").input_ids) + 1
            length += len(tokenizer(f" {question.answer}").input_ids)
            room = LONG_LENGTH if question.kind == "describe" else SINGLE_LENGTH
            assert length <= room, question


def test_orthogonalise_flattens_the_spectrum():
    matrices = torch.randn(3, 32, 16, generator=torch.Generator().manual_seed(0))
    spectrum = torch.linalg.svdvals(orthogonalise(matrices))
    assert spectrum.min() > 0.5 and spectrum.max() < 1.5


def _toy_stage(stop_at=None):
    torch.manual_seed(0)
    module = nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(4, 4)]), "head": nn.Linear(4, 2)})

    def loss(step):
        if step == stop_at:
            raise KeyboardInterrupt
        inputs = torch.randn(8, 4)
        out = module["head"](module["layers"][0](inputs).tanh())
        return (out - inputs[:, :2]).square().mean(), {}

    return Stage("toy", module, loss, lambda: {})


def test_a_killed_stage_goes_on_to_the_same_result(tmp_path):
    plan = Plan(steps=30, checkpoint_seconds=0.0, evaluate_every=7, seed=1)
    whole = _toy_stage()
    train_stage(whole, plan, tmp_path / "whole", Console(quiet=True))
    with pytest.raises(KeyboardInterrupt):
        train_stage(_toy_stage(stop_at=17), plan, tmp_path / "cut", Console(quiet=True))
    resumed = _toy_stage()
    train_stage(resumed, plan, tmp_path / "cut", Console(quiet=True))
    fresh = _toy_stage().module.state_dict()
    for name, value in whole.module.state_dict().items():
        assert torch.equal(value, resumed.module.state_dict()[name])
        assert not torch.equal(value, fresh[name])


def test_a_plan_needs_an_end():
    with pytest.raises(ValueError, match="needs steps or minutes"):
        Plan()


def test_the_recipe_runs_from_scenes_to_an_exported_model(tmp_path):
    torch.set_num_threads(1)
    options = ["--scenes", "40", "--vision-steps", "2", "--decoder-steps", "2", "--layers", "2"]
    options += ["--vision-layers", "1", "--vision-batch", "4", "--decoder-batch", "2"]
    options += ["--output", str(tmp_path), "--device", "cpu", "--no-compile"]
    main(options)
    assert (tmp_path / "model" / "model.safetensors").stat().st_size > 100_000
    before = (tmp_path / "model" / "model.safetensors").read_bytes()
    main(options)
    assert (tmp_path / "model" / "model.safetensors").read_bytes() == before
