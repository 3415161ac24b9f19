"""The picture and the grid of visual tokens are found for models that see it in one piece."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from autoprune import tiny
from autoprune.commands.pictures import as_seen
from autoprune.loading import Loaded, load_model, prepare

IMAGE_TOKEN = 7


def loaded(**config):
    processor = SimpleNamespace(
        image_processor=SimpleNamespace(image_mean=[0.5, 0.4, 0.3], image_std=[0.2, 0.2, 0.2])
    )
    config = SimpleNamespace(image_token_id=IMAGE_TOKEN, model_type="some_vlm", **config)
    return Loaded(SimpleNamespace(config=config), processor, "some model")


def inputs(visual, **tensors):
    ids = torch.tensor([[1, 2] + [IMAGE_TOKEN] * visual + [3]])
    return {"input_ids": ids, **tensors}


@pytest.fixture
def photo():
    return Image.new("RGB", (50, 30), (10, 200, 90))


def test_the_embedded_model_sees_12_by_12_patches_of_its_scene(model_folder):
    model = load_model(str(model_folder))
    scene = tiny.draw_scene(3)
    image, grid = as_seen(model, prepare(model, scene.image, "what is this?"), scene.image)
    assert grid == (12, 12)
    difference = np.asarray(image, int) - np.asarray(scene.image, int)
    assert np.abs(difference).max() <= 1


def test_inputs_are_those_of_the_models_own_prompt(model_folder):
    model = load_model(str(model_folder))
    scene = tiny.draw_scene(3)
    ours = prepare(model, scene.image, "is there a red ring?")
    text = tiny.prompt(model.processor, "is there a red ring?")
    theirs = model.processor(images=scene.image, text=text, return_tensors="pt")
    assert ours["input_ids"].tolist() == theirs["input_ids"].tolist()
    assert torch.equal(ours["pixel_values"], theirs["pixel_values"])


def test_normalised_pixels_become_colours_again(photo):
    pixels = torch.zeros(1, 3, 8, 16)
    image, grid = as_seen(loaded(), inputs(8, pixel_values=pixels), photo)
    assert grid == (2, 4)
    assert image.size == (16, 8)
    assert image.getpixel((0, 0)) == (128, 102, 76)


def test_native_resolution_is_resized_to_merged_patches(photo):
    vision = SimpleNamespace(patch_size=14, spatial_merge_size=2)
    grid = torch.tensor([[1, 4, 6]])
    image, shape = as_seen(loaded(vision_config=vision), inputs(6, image_grid_thw=grid), photo)
    assert shape == (2, 3)
    assert image.size == (6 * 14, 4 * 14)


@pytest.mark.parametrize(
    "tensors",
    [
        {"pixel_values": torch.zeros(1, 5, 3, 8, 8)},
        {"pixel_values": torch.zeros(1, 3, 8, 8)},
        {"image_grid_thw": torch.tensor([[1, 4, 6], [1, 4, 6]])},
        {"image_grid_thw": torch.tensor([[2, 4, 6]])},
    ],
    ids=["tiles", "more tokens than patches", "two pictures", "a video"],
)
def test_several_pieces_are_refused(photo, tensors):
    vision = SimpleNamespace(patch_size=14, spatial_merge_size=2)
    with pytest.raises(ValueError, match="no single grid"):
        as_seen(loaded(vision_config=vision), inputs(17, **tensors), photo)
