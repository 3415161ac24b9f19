"""Scenes drawn by code: a picture and the list of what is in it, the same for the same seed."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
from PIL import Image

from autoprune.tiny import drawing
from autoprune.tiny.vocabulary import COLOUR_NAMES, COLOURS, IMAGE_SIZE, LETTERS, PATCH_SIZE, SHAPES

Split = Literal["train", "heldout"]
Box = tuple[int, int, int, int]
SPLITS: tuple[Split, ...] = ("train", "heldout")
# load_digits lists its 1797 samples by writer: the last fifth holds hands that are not in the rest,
# but for the one writer at the border, who may be on both sides.
FIRST_HELDOUT_DIGIT = 1437
LETTER_ADVANCE = PATCH_SIZE + 1


@dataclass(frozen=True)
class SceneObject:
    """One thing in a scene.

    Parameters
    ----------
    kind : "shape", "digit" or "sign"
    box : left, top, right, bottom in pixels, right and bottom exclusive
    colour, shape : names, for shapes only
    text : the digit or the sign's letters
    part_boxes : the box of each letter of a sign
    sample : index of a digit in scikit-learn's `load_digits`
    """

    kind: Literal["shape", "digit", "sign"]
    box: Box
    colour: str = ""
    shape: str = ""
    text: str = ""
    part_boxes: tuple[Box, ...] = ()
    sample: int = -1

    @property
    def centre(self) -> tuple[float, float]:
        """Centre (x, y) in pixels."""
        left, top, right, bottom = self.box
        return (left + right) / 2, (top + bottom) / 2

    @property
    def patch(self) -> tuple[int, int]:
        """Patch (row, column), from 0, that holds the centre."""
        x, y = self.centre
        return int(y // PATCH_SIZE), int(x // PATCH_SIZE)


@dataclass(frozen=True)
class Scene:
    """A 96x96 RGB picture and its objects; `seed` and `split` redraw it."""

    image: Image.Image
    objects: tuple[SceneObject, ...]
    seed: int
    split: Split


def draw_scene(seed: int, split: Split = "heldout") -> Scene:
    """Draw the scene of a seed; the two splits share no scene and no sample of a digit."""
    if split not in SPLITS:
        raise ValueError(f"split must be one of {SPLITS}, got {split!r}")
    rng = np.random.default_rng([SPLITS.index(split), seed])
    pixels = drawing.draw_background(rng)
    objects: list[SceneObject] = []
    if rng.random() < 0.55:
        _add_sign(pixels, objects, rng)
    for _ in range(rng.choice(3, p=[0.25, 0.35, 0.40])):
        _add_digit(pixels, objects, rng, split)
    for colour, shape in _choose_shapes(rng):
        _add_shape(pixels, objects, rng, colour, shape)
    pixels += rng.normal(0, rng.uniform(1, 7), size=pixels.shape)
    image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    return Scene(image=image, objects=tuple(objects), seed=seed, split=split)


def _choose_shapes(rng: np.random.Generator) -> list[tuple[str, str]]:
    """Two to six (colour, shape) pairs; half the scenes repeat a shape or a colour."""
    count = int(rng.integers(2, 7))
    colours = rng.choice(COLOUR_NAMES, size=count)
    shapes = rng.choice(SHAPES, size=count)
    theme = rng.random()
    repeats = int(rng.integers(2, count + 1))
    if theme < 0.3:
        shapes[:repeats] = shapes[0]
    elif theme < 0.6:
        colours[:repeats] = colours[0]
    return [(str(colour), str(shape)) for colour, shape in zip(colours, shapes, strict=True)]


def _find_place(
    objects: list[SceneObject], rng: np.random.Generator, width: int, height: int
) -> tuple[int, int] | None:
    """A free (left, top) that keeps two pixels to every other object, or None."""
    for _ in range(60):
        left = int(rng.integers(0, IMAGE_SIZE - width + 1))
        top = int(rng.integers(0, IMAGE_SIZE - height + 1))
        if all(
            left + width + 2 <= other.box[0]
            or other.box[2] + 2 <= left
            or top + height + 2 <= other.box[1]
            or other.box[3] + 2 <= top
            for other in objects
        ):
            return left, top
    return None


def _ink(rng: np.random.Generator, light: bool) -> drawing.Pixels:
    low, high = (225, 256) if light else (0, 30)
    return np.full(3, rng.uniform(low, high), dtype=np.float32)


def _add_sign(pixels: drawing.Pixels, objects: list[SceneObject], rng: np.random.Generator) -> None:
    """Two printed letters on a plate; each letter's centre lies in a patch of its own."""
    text = "".join(rng.choice(list(LETTERS), size=2))
    height = int(rng.integers(9, 14))
    masks = [drawing.letter_mask(letter, height) for letter in text]
    widths = [mask.shape[1] for mask in masks]
    advance = max(LETTER_ADVANCE, (widths[0] + widths[1] + 1) // 2 + 2)
    plate = (widths[0] + widths[1] + 1) // 2 + advance + 4, height + 4
    place = _find_place(objects, rng, *plate)
    if place is None:
        return
    left, top = place
    light = bool(rng.random() < 0.5)
    drawing.paint(pixels, np.ones((plate[1], plate[0]), np.float32), left, top, _ink(rng, light))
    first_centre = left + 2 + widths[0] / 2
    boxes = []
    for index, mask in enumerate(masks):
        letter_left = round(first_centre + index * advance - mask.shape[1] / 2)
        drawing.paint(pixels, mask, letter_left, top + 2, _ink(rng, not light))
        boxes.append((letter_left, top + 2, letter_left + mask.shape[1], top + 2 + height))
    box = (left, top, left + plate[0], top + plate[1])
    objects.append(SceneObject("sign", box, text=text, part_boxes=tuple(boxes)))


def _add_digit(
    pixels: drawing.Pixels, objects: list[SceneObject], rng: np.random.Generator, split: Split
) -> None:
    strokes, labels = digit_samples()
    low, high = (0, FIRST_HELDOUT_DIGIT) if split == "train" else (FIRST_HELDOUT_DIGIT, len(labels))
    sample = int(rng.integers(low, high))
    size = int(rng.integers(11, 19))
    place = _find_place(objects, rng, size, size)
    if place is None:
        return
    mask = drawing.digit_mask(strokes[sample], size, warp=rng if split == "train" else None)
    drawing.paint(pixels, mask, *place, _ink(rng, bool(rng.random() < 0.5)))
    box = (place[0], place[1], place[0] + size, place[1] + size)
    objects.append(SceneObject("digit", box, text=str(labels[sample]), sample=sample))


def _add_shape(
    pixels: drawing.Pixels,
    objects: list[SceneObject],
    rng: np.random.Generator,
    colour: str,
    shape: str,
) -> None:
    """A shape from one patch up to four patches wide, mostly small."""
    low, high = [(8, 12), (12, 18), (18, 25), (25, 33)][rng.choice(4, p=[0.5, 0.35, 0.11, 0.04])]
    size = int(rng.integers(low, high))
    place = _find_place(objects, rng, size, size)
    while place is None and size > PATCH_SIZE:
        size = max(PATCH_SIZE, size // 2)
        place = _find_place(objects, rng, size, size)
    if place is None:
        return
    tint = np.asarray(COLOURS[colour], np.float32) + rng.uniform(-14, 14, size=3)
    drawing.paint(pixels, drawing.shape_mask(shape, size), *place, tint.astype(np.float32))
    box = (place[0], place[1], place[0] + size, place[1] + size)
    objects.append(SceneObject("shape", box, colour=colour, shape=shape))


@lru_cache(maxsize=1)
def digit_samples() -> tuple[drawing.Pixels, np.ndarray]:
    """Strokes [1797, 8, 8] in 0..16 and labels [1797] of scikit-learn's handwritten digits."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError(
            "scenes hold handwritten digits from scikit-learn, which is not installed: "
            "pip install 'autoprune[demo]'"
        ) from error
    digits = load_digits()
    return digits.images.astype(np.float32), digits.target
