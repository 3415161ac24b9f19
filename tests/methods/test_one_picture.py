"""A method applied to the tensors of one picture does what it does in a model."""

from __future__ import annotations

import pytest
import torch

import autoprune
from autoprune import tiny
from autoprune.methods.one_picture import check_one_picture, prune_picture

SEEN = ("vision_scores", "vision_received", "vision_middle", "vision_keys", "places")
POSSIBLE = (
    "fastervlm",
    "vispruner",
    "visionzip",
    "prumerge",
    "hiprune",
    "divprune",
    "scope",
    "folder",
    "pooling",
    "uniform",
    "random",
)


def seen_by_hand(number: int = 16) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    seen = {name: torch.rand(number, generator=generator) for name in SEEN[:3]}
    seen["vision_keys"] = torch.randn(number, 8, generator=generator)
    side = torch.arange(4.0)
    grid = [torch.zeros(16), side.repeat_interleave(4), side.repeat(4)]
    return seen | {"places": torch.stack(grid, dim=1)[:number]}


def test_the_best_scored_stay_in_their_order():
    seen = {"vision_scores": torch.tensor([0.1, 0.9, 0.3, 0.8, 0.2])}
    embeddings = torch.arange(10.0).reshape(5, 2)
    kept, states = prune_picture(autoprune.create("fastervlm", 1), embeddings, 3, seen)
    assert kept.tolist() == [1, 2, 3]
    assert states.tolist() == [[2, 3], [4, 5], [6, 7]]


def test_padding_of_the_picture_comes_last():
    seen = {
        "vision_scores": torch.tensor([0.1, 0.9, 0.3, 0.8]),
        "vision_padding": torch.tensor([False, True, False, True]),
    }
    kept, _ = prune_picture(autoprune.create("fastervlm", 1), torch.eye(4), 2, seen)
    assert kept.tolist() == [0, 2]


@pytest.mark.parametrize("name", POSSIBLE)
def test_every_count_is_met(name):
    method = autoprune.create(name, 1)
    check_one_picture(method)
    embeddings = torch.randn(16, 8, generator=torch.Generator().manual_seed(1))
    for count in range(1, 17):
        kept, states = prune_picture(method, embeddings, count, seen_by_hand())
        assert len(set(kept.tolist())) == count == len(states)
        assert kept.tolist() == sorted(kept.tolist())
    assert torch.equal(states, embeddings)


@pytest.mark.parametrize("name", ["divprune", "random", "pooling"])
def test_it_is_what_the_method_does_in_a_model(name):
    """Of features that need no tower: those of the projector, and what the trace says was kept."""
    model, processor = tiny.load()
    scene = tiny.draw_scene(seed=5)
    text = tiny.prompt(processor, "what color is the circle?")
    inputs = processor(images=scene.image, text=text, return_tensors="pt")
    with torch.no_grad():
        features = model.model.get_image_features(inputs["pixel_values"]).pooler_output[0]
        with autoprune.create(name, 20)(model) as trace:
            model(**inputs)
    side = torch.arange(12.0)
    grid = [torch.zeros(144), side.repeat_interleave(12), side.repeat(12)]
    seen = {"places": torch.stack(grid, dim=1)}
    kept, _ = prune_picture(autoprune.create(name, 1), features, 20, seen)
    assert kept.tolist() == trace.samples[0].kept[0].tolist()


@pytest.mark.parametrize(
    ("method", "why"),
    [
        (autoprune.create("autoprune", 8), "inside the decoder"),
        (autoprune.create("fastv", 8), "inside the decoder"),
        (autoprune.create("cdpruner", 8), "looks at the prompt's text"),
        (autoprune.create("tome", 8), "inside the vision tower"),
        (autoprune.create("fastervlm", 8, merger="summary"), "merger=None"),
        (autoprune.create("visionzip", 8, proportional=True), "proportional=False"),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_what_cannot_prune_one_picture_is_refused(method, why):
    with pytest.raises(ValueError, match=f"{method.name} cannot prune a picture .*{why}"):
        check_one_picture(method)


@pytest.mark.parametrize("count", [0, -1, 5])
def test_a_count_that_the_picture_has_not_is_refused(count):
    with pytest.raises(ValueError, match="from 1 to 4"):
        prune_picture(autoprune.create("divprune", 1), torch.eye(4), count, {})


def test_what_was_not_seen_is_named():
    with pytest.raises(ValueError, match="the tower gave none"):
        prune_picture(autoprune.create("fastervlm", 1), torch.eye(4), 2, {})
