"""Which visual token is drawn where, for every way in which families lay out pictures."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from autoprune.commands.pictures import views
from autoprune.loading import Loaded
from autoprune.methods.looking import look
from autoprune.viz import View, join_tiles
from tests import zoo

PHOTO = Image.new("RGB", (90, 60), (10, 200, 90))


def loaded(model):
    image_processor = SimpleNamespace(image_mean=[0.5] * 3, image_std=[0.5] * 3)
    return Loaded(model, SimpleNamespace(image_processor=image_processor), "a model")


def grid(rows, columns, first=0, step=None):
    """Tokens row by row; `step` from one row to the next."""
    step = columns if step is None else step
    return [[first + row * step + column for column in range(columns)] for row in range(rows)]


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("llava", [grid(4, 4)]),
        # A small version of 16 tokens, then two tiles side by side, with a newline behind each row.
        ("llava_next", [grid(4, 8, 16, 9), grid(4, 4)]),
        ("llava_onevision", [grid(4, 8, 16, 9), grid(4, 4)]),
        # 8 x 12 patches, 2 x 2 of which make a token.
        ("qwen2_vl", [grid(4, 6)]),
        ("qwen2_5_vl", [grid(4, 6)]),
        ("qwen3_vl", [grid(4, 6)]),
        # 8 x 8 patches, shuffled or pooled to 4 x 4 tokens.
        ("internvl", [grid(4, 4)]),
        ("idefics3", [grid(4, 4)]),
        ("gemma3", [grid(4, 4)]),
        # 56 x 84 pixels in patches of 7, 2 x 2 of which make a token.
        ("mistral3", [grid(4, 6)]),
    ],
)
def test_tokens_lie_where_the_family_puts_them(family, expected):
    model = zoo.build(family, zoo.FAMILIES[family].attentions[0])
    inputs = zoo.inputs(family, model, "padded3", only=0)
    seen = views(loaded(model), inputs, PHOTO, look(model, inputs))
    assert [view.tokens.tolist() for view in seen] == expected


COLOURS = [
    (220, 30, 30),
    (30, 220, 30),
    (30, 30, 220),
    (220, 220, 30),
    (220, 30, 220),
    (30, 220, 220),
]


def six_tiles():
    """A picture of 2 x 3 colours and its tiles, row by row."""
    tiles = [Image.new("RGB", (56, 56), colour) for colour in COLOURS]
    whole = Image.new("RGB", (168, 112))
    for index, tile in enumerate(tiles):
        whole.paste(tile, (index % 3 * 56, index // 3 * 56))
    return whole, tiles


def test_tiles_of_internvl_are_joined_and_the_thumbnail_stands_apart():
    whole, tiles = six_tiles()
    pictures = [*tiles, whole.resize((56, 56))]
    pixels = [
        np.asarray(picture, np.float32).transpose(2, 0, 1) / 127.5 - 1 for picture in pictures
    ]
    model = zoo.build("internvl")
    ids = [zoo.BOS, 5, 6, 132, *[zoo.IMAGE] * 7 * 16, 133, 7, 8]
    inputs = {"input_ids": torch.tensor([ids]), "pixel_values": torch.tensor(np.stack(pixels))}
    joined, small = views(loaded(model), inputs, whole, look(model, inputs))
    assert small.tokens.tolist() == grid(4, 4, first=6 * 16)
    assert joined.image.size == whole.size
    for row in range(8):
        for column in range(12):
            tile = row // 4 * 3 + column // 4
            assert joined.tokens[row, column] == 16 * tile + row % 4 * 4 + column % 4
            assert joined.image.getpixel((column * 14 + 7, row * 14 + 7)) == COLOURS[tile]


def as_views(pictures):
    return [View.whole(picture, (2, 2), 4 * index) for index, picture in enumerate(pictures)]


@pytest.mark.parametrize("small", ["before", "behind", "none"])
def test_a_small_version_is_found_wherever_it_stands(small):
    whole, tiles = six_tiles()
    thumbnail = [whole.resize((56, 56))]
    pictures = {"before": thumbnail + tiles, "behind": tiles + thumbnail, "none": tiles}[small]
    found = join_tiles(as_views(pictures), whole)
    first = 4 if small == "before" else 0
    assert found[0].tokens.shape == (4, 6)
    assert found[0].tokens[0].tolist() == [first + n for n in (0, 1, 4, 5, 8, 9)]
    rest = [view.tokens.min() for view in found[1:]]
    assert rest == {"before": [0], "behind": [24], "none": []}[small]


def test_pictures_that_are_no_tiles_stay_apart():
    _, tiles = six_tiles()
    other = Image.new("RGB", (50, 50), (0, 0, 0))
    assert len(join_tiles(as_views(tiles), other)) == 6
