"""Scenes of the second benchmark model: things in a grid of 3 x 3 cells over the crop of a photograph.

A thing is a coloured symbol (a glyph of DejaVu Sans), a handwritten digit (scikit-learn's), or a printed
word, which takes two cells side by side. The same seed and split give the same scene. The two splits share
no seed, no photograph and no sample of a digit.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter, ImageFont

IMAGE_SIZE = 96
PATCH_SIZE = 8
PATCHES = IMAGE_SIZE // PATCH_SIZE
CELLS = 3
CELL_SIZE = IMAGE_SIZE // CELLS
SPLITS = ("train", "heldout")

SYMBOLS = {
    "umbrella": "\N{UMBRELLA}",
    "phone": "\N{BLACK TELEPHONE}",
    "plane": "\N{AIRPLANE}",
    "anchor": "\N{ANCHOR}",
    "star": "\N{BLACK STAR}",
    "heart": "\N{BLACK HEART SUIT}",
    "sun": "\N{BLACK SUN WITH RAYS}",
    "cloud": "\N{CLOUD}",
    "horse": "\N{BLACK CHESS KNIGHT}",
    "flag": "\N{BLACK FLAG}",
    "flower": "\N{BLACK FLORETTE}",
    "crown": "\N{BLACK CHESS KING}",
}
COLOURS = {
    "red": (214, 32, 38),
    "orange": (245, 134, 22),
    "yellow": (247, 222, 50),
    "green": (34, 160, 58),
    "blue": (36, 84, 224),
    "purple": (142, 44, 178),
    "white": (245, 245, 245),
    "black": (18, 18, 18),
}
WORDS = [
    "bread",
    "apple",
    "lemon",
    "honey",
    "sugar",
    "water",
    "river",
    "ocean",
    "beach",
    "stone",
    "metal",
    "paper",
    "chair",
    "table",
    "grape",
    "clock",
    "salad",
    "house",
    "door",
    "road",
    "truck",
    "train",
    "boat",
    "wheel",
    "plant",
    "tiger",
    "sheep",
    "mouse",
    "eagle",
    "snake",
    "whale",
    "music",
    "dance",
    "piano",
    "drum",
    "smile",
    "dream",
    "night",
    "storm",
    "snow",
    "wind",
    "fire",
    "gold",
    "silk",
    "rope",
    "lamp",
    "book",
    "king",
    "ship",
    "farm",
]
FONTS = [
    "DejaVuSans.ttf",
    "DejaVuSans-Bold.ttf",
    "DejaVuSansMono-Bold.ttf",
    "DejaVuSerif.ttf",
    "DejaVuSerif-Bold.ttf",
    "DejaVuSans-BoldOblique.ttf",
    "STIXGeneralBol.ttf",
    "STIXGeneralBolIta.ttf",
]
PHOTOGRAPHS = {
    "train": [
        "astronaut.png",
        "camera.png",
        "chelsea.png",
        "coins.png",
        "brick.png",
        "grass.png",
        "gravel.png",
        "moon.png",
        "ihc.png",
        "hubble_deep_field.jpg",
        "retina.jpg",
        "china.jpg",
    ],
    "heldout": ["coffee.png", "rocket.jpg", "flower.jpg"],
}
# load_digits lists its 1797 samples by writer, so the last ones are of other hands.
FIRST_HELDOUT_DIGIT = 1437

Pixels = NDArray[np.float32]
Cell = tuple[int, int]
Box = tuple[int, int, int, int]


@dataclass(frozen=True)
class Thing:
    """One thing in a scene.

    Attributes:
        kind: "symbol", "digit" or "word".
        name: the symbol's name, the digit or the word.
        colour: of a symbol; else "".
        cells: (row, column) of the cells it takes, from 0.
        box: left, top, right, bottom in pixels, right and bottom exclusive.
    """

    kind: str
    name: str
    colour: str
    cells: tuple[Cell, ...]
    box: Box


@dataclass(frozen=True)
class Scene:
    """A picture, uint8 [96, 96, 3], and what is in it."""

    pixels: NDArray[np.uint8]
    things: tuple[Thing, ...]

    @property
    def image(self) -> Image.Image:
        """The picture for a processor."""
        return Image.fromarray(self.pixels)


def draw_scene(seed: int, split: str = "heldout") -> Scene:
    """The scene of a seed."""
    rng = np.random.default_rng([SPLITS.index(split), seed])
    pixels = _background(rng, split)
    free = [(row, column) for row in range(CELLS) for column in range(CELLS)]
    things = []
    if rng.random() < 0.6:
        things.append(_add_word(pixels, free, rng))
    for _ in range(rng.choice(3, p=[0.2, 0.35, 0.45])):
        things.append(_add_digit(pixels, _take(free, rng), rng, split))
    for name, colour in _choose_symbols(rng, int(rng.integers(2, len(free) + 1))):
        things.append(_add_symbol(pixels, _take(free, rng), name, colour, rng))
    return Scene(pixels.clip(0, 255).astype(np.uint8), tuple(things))


def patch_labels(scene: Scene) -> NDArray[np.int64]:
    """What each patch shows, [12, 12, 4]: symbol, colour, digit, word, each counted from 1, 0 for none.

    A patch shows a thing if its centre lies in the thing's box.
    """
    labels = np.zeros((PATCHES, PATCHES, 4), dtype=np.int64)
    for thing in scene.things:
        left, top, right, bottom = (round(edge / PATCH_SIZE) for edge in thing.box)
        patch = labels[top:bottom, left:right]
        if thing.kind == "symbol":
            patch[..., 0] = 1 + list(SYMBOLS).index(thing.name)
            patch[..., 1] = 1 + list(COLOURS).index(thing.colour)
        elif thing.kind == "digit":
            patch[..., 2] = 1 + int(thing.name)
        else:
            patch[..., 3] = 1 + WORDS.index(thing.name)
    return labels


LABEL_SIZES = (len(SYMBOLS) + 1, len(COLOURS) + 1, 11, len(WORDS) + 1)


def _take(free: list[Cell], rng: np.random.Generator) -> Cell:
    return free.pop(rng.integers(len(free)))


def _choose_symbols(rng: np.random.Generator, count: int) -> list[tuple[str, str]]:
    """Names and colours; often one name or colour comes several times, so that there is much to count."""
    names = rng.choice(list(SYMBOLS), count)
    colours = rng.choice(list(COLOURS), count)
    if rng.random() < 0.5:
        colours[rng.random(count) < 0.6] = colours[0]
    if rng.random() < 0.35:
        names[rng.random(count) < 0.6] = names[0]
    return [(str(name), str(colour)) for name, colour in zip(names, colours, strict=True)]


def _add_symbol(
    pixels: Pixels, cell: Cell, name: str, colour: str, rng: np.random.Generator
) -> Thing:
    mask, halo = _symbol_masks(name, int(rng.integers(19, 28)))
    box = _place(mask.shape, cell, 1, rng)
    paint = np.array(COLOURS[colour], dtype=np.float32) + rng.uniform(-10, 10, 3)
    edge = 235.0 if paint @ (0.3, 0.6, 0.1) < 90 else 25.0
    _blend(pixels, box, halo * 0.75, edge)
    _blend(pixels, box, mask, paint)
    return Thing("symbol", name, colour, (cell,), box)


def _add_digit(pixels: Pixels, cell: Cell, rng: np.random.Generator, split: str) -> Thing:
    samples, targets = _digits()
    first, end = (
        (0, FIRST_HELDOUT_DIGIT) if split == "train" else (FIRST_HELDOUT_DIGIT, len(targets))
    )
    sample = int(rng.integers(first, end))
    size = int(rng.integers(22, 29))
    ink = np.asarray(
        Image.fromarray(samples[sample]).resize((size, size), Image.Resampling.BICUBIC),
        dtype=np.float32,
    )
    box = _place(ink.shape, cell, 1, rng)
    _write_on_plate(pixels, box, ink / 255, rng)
    return Thing("digit", str(targets[sample]), "", (cell,), box)


def _add_word(pixels: Pixels, free: list[Cell], rng: np.random.Generator) -> Thing:
    row, column = int(rng.integers(CELLS)), int(rng.integers(CELLS - 1))
    cells = ((row, column), (row, column + 1))
    for cell in cells:
        free.remove(cell)
    word = WORDS[rng.integers(len(WORDS))]
    mask = _word_mask(word, FONTS[rng.integers(len(FONTS))], int(rng.integers(17, 22)))
    box = _place(mask.shape, cells[0], 2, rng)
    _write_on_plate(pixels, box, mask, rng)
    return Thing("word", word, "", cells, box)


def _place(shape: tuple[int, ...], cell: Cell, width: int, rng: np.random.Generator) -> Box:
    """A box of this height and width anywhere in a cell, or in `width` cells side by side."""
    height, length = shape[0], shape[1]
    top = cell[0] * CELL_SIZE + int(rng.integers(CELL_SIZE - height + 1))
    left = cell[1] * CELL_SIZE + int(rng.integers(width * CELL_SIZE - length + 1))
    return left, top, left + length, top + height


def _write_on_plate(pixels: Pixels, box: Box, ink: Pixels, rng: np.random.Generator) -> None:
    """Dark ink on a light plate, or light ink on a dark one."""
    light, dark = rng.uniform(190, 250, 3), rng.uniform(10, 70, 3)
    plate, paint = (light, dark) if rng.random() < 0.7 else (dark, light)
    _blend(pixels, box, np.full(ink.shape, 0.85, dtype=np.float32), plate)
    _blend(pixels, box, ink, paint)


def _blend(pixels: Pixels, box: Box, mask: Pixels, paint: NDArray[np.floating] | float) -> None:
    left, top, right, bottom = box
    part = pixels[top:bottom, left:right]
    part += mask[..., None] * (paint - part)


def _background(rng: np.random.Generator, split: str) -> Pixels:
    """A crop of a photograph, float32 [96, 96, 3], a little flatter than it was taken."""
    photographs = _photographs(split)
    photograph = photographs[rng.integers(len(photographs))]
    scale = photograph[rng.integers(len(photograph))]
    top, left = (int(rng.integers(length - IMAGE_SIZE + 1)) for length in scale.shape[:2])
    crop = scale[top : top + IMAGE_SIZE, left : left + IMAGE_SIZE].astype(np.float32)
    if rng.random() < 0.5:
        crop = crop[:, ::-1]
    mean = crop.mean()
    return (crop - mean) * np.float32(rng.uniform(0.4, 0.9)) + mean.clip(60, 190)


@lru_cache
def _photographs(split: str) -> list[list[NDArray[np.uint8]]]:
    """Every photograph of a split at three sizes."""
    import skimage
    import sklearn.datasets

    folders = (
        Path(skimage.__file__).parent / "data",
        Path(sklearn.datasets.__file__).parent / "images",
    )
    found = []
    for name in PHOTOGRAPHS[split]:
        paths = [folder / name for folder in folders if (folder / name).is_file()]
        if not paths:
            raise ValueError(
                f"the photograph {name} is in neither of {', '.join(map(str, folders))}; "
                "install scikit-image and scikit-learn"
            )
        picture = Image.open(paths[0]).convert("RGB")
        found.append([np.asarray(_short_side(picture, size)) for size in (110, 160, 240)])
    return found


def _short_side(picture: Image.Image, size: int) -> Image.Image:
    factor = size / min(picture.size)
    return picture.resize((round(picture.width * factor), round(picture.height * factor)))


@lru_cache
def _digits() -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Every sample, uint8 [1797, 8, 8], and what it is."""
    from sklearn.datasets import load_digits

    found = load_digits()
    return (found.images * (255 / 16)).astype(np.uint8), found.target


@cache
def _symbol_masks(name: str, size: int) -> tuple[Pixels, Pixels]:
    """Coverage of a symbol whose longer side has this size, and of the symbol with an edge around it."""
    font = ImageFont.truetype(_font_file("DejaVuSans.ttf"), 96)
    glyph = _cropped(SYMBOLS[name], font)
    factor = (size - 2) / max(glyph.size)
    glyph = glyph.resize(
        (round(glyph.width * factor), round(glyph.height * factor)), Image.Resampling.LANCZOS
    )
    framed = Image.new("L", (glyph.width + 2, glyph.height + 2))
    framed.paste(glyph, (1, 1))
    return _coverage(framed), _coverage(framed.filter(ImageFilter.MaxFilter(3)))


@cache
def _word_mask(word: str, font: str, size: int) -> Pixels:
    """Coverage of a word with two pixels of space around it, never wider than two cells."""
    text = _cropped(word, ImageFont.truetype(_font_file(font), size))
    widest = 2 * CELL_SIZE - 4
    if text.width > widest:
        text = text.resize((widest, text.height), Image.Resampling.LANCZOS)
    framed = Image.new("L", (text.width + 4, text.height + 4))
    framed.paste(text, (2, 2))
    return _coverage(framed)


def _cropped(text: str, font: ImageFont.FreeTypeFont) -> Image.Image:
    left, top, right, bottom = (int(edge) for edge in font.getbbox(text))
    picture = Image.new("L", (right - left, bottom - top))
    ImageDraw.Draw(picture).text((-left, -top), text, font=font, fill=255)
    return picture.crop(picture.getbbox())


def _coverage(picture: Image.Image) -> Pixels:
    return np.asarray(picture, dtype=np.float32) / 255


def _font_file(name: str) -> str:
    import matplotlib

    return str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name)
