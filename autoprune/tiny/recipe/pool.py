"""A pool of drawn scenes on disk, with the labels of every patch: the training data."""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from autoprune.tiny.scenes import Box, Scene, SceneObject, Split, draw_scene
from autoprune.tiny.vocabulary import CHARACTERS, COLOUR_NAMES, GRID, IMAGE_SIZE, PATCH_SIZE, SHAPES

IGNORE = -100
# What a patch is labelled with, and the number of classes; class 0 of the first four is "none".
PATCH_TARGETS = {
    "colour": len(COLOUR_NAMES) + 1,
    "shape": len(SHAPES) + 1,
    "character": len(CHARACTERS) + 1,
    "letter_slot": 3,
    "centre": 2,
    "row": GRID,
    "column": GRID,
}
NUM_PRESENCE = len(COLOUR_NAMES) * len(SHAPES) + len(CHARACTERS)
_SHARE_OF_A_PATCH = 0.25
# Starting worker processes takes longer than drawing this many scenes.
_WORTH_A_PROCESS = 3000


@dataclass(frozen=True)
class Pool:
    """Scenes ready for training.

    images : uint8 [scenes, 96, 96, 3]; patch_labels : int8 [scenes, 7, 144] in the order of
    PATCH_TARGETS, IGNORE where a patch is ambiguous; presence : uint8 [scenes, NUM_PRESENCE];
    objects : what each scene holds.
    """

    images: NDArray[np.uint8]
    patch_labels: NDArray[np.int8]
    presence: NDArray[np.uint8]
    objects: list[tuple[SceneObject, ...]]

    def __len__(self) -> int:
        return len(self.objects)


def label_patches(objects: tuple[SceneObject, ...]) -> NDArray[np.int8]:
    """Labels int8 [7, 144] of a scene's patches, in the order of PATCH_TARGETS."""
    labels = np.zeros((len(PATCH_TARGETS), GRID, GRID), dtype=np.int8)
    labels[5], labels[6] = np.mgrid[0:GRID, 0:GRID]
    best = np.zeros((GRID, GRID))
    parts = [part for item in objects for part in _parts(item)]
    for item in objects:
        touched = _coverage(item.box) > 0
        labels[:5, touched] = IGNORE
    for box, classes in parts:
        covered = _coverage(box)
        row, column = _centre_patch(box)
        covered[row, column] = 2.0
        mine = (covered >= _SHARE_OF_A_PATCH) & (covered > best)
        best[mine] = covered[mine]
        for index, value in enumerate((*classes, 0, row, column)):
            labels[index, mine] = value
        labels[4, row, column] = 1
    return labels.reshape(len(PATCH_TARGETS), -1)


def label_presence(objects: tuple[SceneObject, ...]) -> NDArray[np.uint8]:
    """Which (colour, shape) pairs, digits and letters a scene holds, uint8 [NUM_PRESENCE]."""
    present = np.zeros(NUM_PRESENCE, dtype=np.uint8)
    pairs = len(COLOUR_NAMES) * len(SHAPES)
    for item in objects:
        if item.kind == "shape":
            colour, shape = COLOUR_NAMES.index(item.colour), SHAPES.index(item.shape)
            present[colour * len(SHAPES) + shape] = 1
        for character in item.text:
            present[pairs + CHARACTERS.index(character)] = 1
    return present


def _parts(item: SceneObject) -> list[tuple[Box, tuple[int, int, int, int]]]:
    """Boxes of an object's parts with their colour, shape, character and letter-slot classes."""
    if item.kind == "shape":
        classes = COLOUR_NAMES.index(item.colour) + 1, SHAPES.index(item.shape) + 1, 0, 0
        return [(item.box, classes)]
    if item.kind == "digit":
        return [(item.box, (0, 0, CHARACTERS.index(item.text) + 1, 0))]
    return [
        (box, (0, 0, CHARACTERS.index(letter) + 1, slot + 1))
        for slot, (box, letter) in enumerate(zip(item.part_boxes, item.text, strict=True))
    ]


def _centre_patch(box: Box) -> tuple[int, int]:
    return (box[1] + box[3]) // 2 // PATCH_SIZE, (box[0] + box[2]) // 2 // PATCH_SIZE


def _coverage(box: Box) -> NDArray[np.float64]:
    """Share of each patch that a box covers, [rows, columns]."""
    edges = np.arange(0, IMAGE_SIZE + 1, PATCH_SIZE)
    left, top, right, bottom = box
    width = np.clip(np.minimum(edges[1:], right) - np.maximum(edges[:-1], left), 0, None)
    height = np.clip(np.minimum(edges[1:], bottom) - np.maximum(edges[:-1], top), 0, None)
    return np.outer(height, width) / PATCH_SIZE**2


def open_pool(folder: Path, count: int, split: Split = "train", workers: int = 2) -> Pool:
    """The first `count` scenes of a split, drawn once and kept under `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    name = f"{split}-{count}"
    done = folder / f"{name}.json"
    if not done.exists():
        _draw_pool(folder, name, count, split, workers)
        done.write_text(json.dumps({"count": count, "split": split}))
    with open(folder / f"{name}.objects", "rb") as file:
        objects = pickle.load(file)
    return Pool(
        images=np.load(folder / f"{name}.images.npy", mmap_mode="r"),
        patch_labels=np.load(folder / f"{name}.patches.npy"),
        presence=np.load(folder / f"{name}.presence.npy"),
        objects=objects,
    )


def _draw_pool(folder: Path, name: str, count: int, split: Split, workers: int) -> None:
    images = np.empty((count, IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.uint8)
    objects: list[tuple[SceneObject, ...]] = []
    for index, scene in enumerate(_draw_scenes(count, split, workers)):
        images[index] = np.asarray(scene.image, dtype=np.uint8)
        objects.append(scene.objects)
    np.save(folder / f"{name}.images.npy", images)
    np.save(folder / f"{name}.patches.npy", np.stack([label_patches(item) for item in objects]))
    np.save(folder / f"{name}.presence.npy", np.stack([label_presence(item) for item in objects]))
    with open(folder / f"{name}.objects", "wb") as file:
        pickle.dump(objects, file)


def _draw_scenes(count: int, split: Split, workers: int) -> Iterator[Scene]:
    if count < _WORTH_A_PROCESS:
        yield from (draw_scene(seed, split) for seed in range(count))
        return
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as executor:
        yield from executor.map(draw_scene, range(count), [split] * count, chunksize=250)
