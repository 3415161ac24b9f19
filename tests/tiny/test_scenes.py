"""Scenes: the same for the same seed, tidy, and with writers of digits kept apart."""

import numpy as np
import pytest

from autoprune.tiny.recipe.pool import IGNORE, PATCH_TARGETS, label_patches, label_presence
from autoprune.tiny.scenes import FIRST_HELDOUT_DIGIT, digit_samples, draw_scene
from autoprune.tiny.vocabulary import CHARACTERS, COLOUR_NAMES, IMAGE_SIZE, PATCH_SIZE, SHAPES
from tests.tiny.scene_objects import of_kind

SEEDS = range(120)


@pytest.fixture(scope="module")
def scenes():
    return [draw_scene(seed, split) for seed in SEEDS for split in ("train", "heldout")]


def test_a_seed_always_draws_the_same_scene():
    first, second = draw_scene(5), draw_scene(5)
    assert first.objects == second.objects
    assert np.array_equal(np.asarray(first.image), np.asarray(second.image))


def test_seeds_and_splits_draw_different_scenes():
    assert draw_scene(5).objects != draw_scene(6).objects
    assert draw_scene(5, "train").objects != draw_scene(5, "heldout").objects


def test_an_unknown_split_is_refused_by_name():
    with pytest.raises(ValueError, match=r"split must be one of .*'test'"):
        draw_scene(0, "test")


def test_objects_stay_inside_the_picture_and_apart(scenes):
    for scene in scenes:
        assert scene.image.size == (IMAGE_SIZE, IMAGE_SIZE)
        covered = np.zeros((IMAGE_SIZE, IMAGE_SIZE), dtype=int)
        for item in scene.objects:
            left, top, right, bottom = item.box
            assert 0 <= left < right <= IMAGE_SIZE and 0 <= top < bottom <= IMAGE_SIZE
            covered[top:bottom, left:right] += 1
        assert covered.max() <= 1


def test_objects_come_in_every_size_and_most_of_the_picture_is_background(scenes):
    boxes = [item.box for scene in scenes for item in of_kind(scene, "shape")]
    widths = np.array([right - left for left, _, right, _ in boxes])
    assert widths.min() == PATCH_SIZE and widths.max() > 3 * PATCH_SIZE
    assert np.median(widths) < 2 * PATCH_SIZE
    area = [sum((b[2] - b[0]) * (b[3] - b[1]) for b in (i.box for i in s.objects)) for s in scenes]
    assert np.mean(area) < 0.25 * IMAGE_SIZE**2


def test_a_shape_shows_its_colour_at_its_centre():
    for seed in range(40):
        scene = draw_scene(seed)
        pixels = np.asarray(scene.image, dtype=float)
        for item in of_kind(scene, "shape"):
            if item.shape == "ring":
                continue
            x, y = (int(value) for value in item.centre)
            grey = np.ptp(pixels[y, x])
            assert grey > 40, (seed, item)


def test_heldout_digits_are_never_trained_on(scenes):
    samples = {"train": set(), "heldout": set()}
    for scene in scenes:
        samples[scene.split] |= {item.sample for item in of_kind(scene, "digit")}
    assert max(samples["train"]) < FIRST_HELDOUT_DIGIT <= min(samples["heldout"])
    assert len(samples["train"]) > 50 and len(samples["heldout"]) > 50


def test_a_digit_carries_the_label_of_its_sample(scenes):
    labels = digit_samples()[1]
    for scene in scenes:
        for item in of_kind(scene, "digit"):
            assert item.text == str(labels[item.sample])


def test_every_object_labels_the_patch_of_its_centre(scenes):
    for scene in scenes:
        labels = dict(zip(PATCH_TARGETS, label_patches(scene.objects), strict=True))
        centres = 0
        for item in scene.objects:
            parts = item.part_boxes or (item.box,)
            centres += len(parts)
            if item.kind == "shape":
                index = item.patch[0] * 12 + item.patch[1]
                assert labels["colour"][index] == COLOUR_NAMES.index(item.colour) + 1
                assert labels["shape"][index] == SHAPES.index(item.shape) + 1
        assert (labels["centre"] == 1).sum() == centres
        assert (labels["colour"] != IGNORE).mean() > 0.5


def test_presence_names_what_is_there(scenes):
    for scene in scenes[:40]:
        pairs = {(i.colour, i.shape) for i in of_kind(scene, "shape")}
        characters = {c for i in scene.objects for c in i.text}
        present = label_presence(scene.objects)
        names = [(c, s) for c in COLOUR_NAMES for s in SHAPES] + list(CHARACTERS)
        assert {n for n, p in zip(names, present, strict=True) if p} == pairs | characters
