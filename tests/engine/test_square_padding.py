"""The padding of a square picture, as the released AutoPrune knows it: with a border of the picture's own."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import LlavaForConditionalGeneration

from autoprune import AutoPruneReference
from autoprune.contract import Tower
from autoprune.engine.vision.patches import patches_outside
from tests import zoo
from tests.golden_data import golden_root
from tests.watch import Watch, observe

MEAN, DEVIATION = (0.481, 0.458, 0.408), (0.269, 0.261, 0.276)
SIDE, PATCH, GRID = 336, 14, 24
IMAGE_TOKEN = 511


def photo(width: int, height: int, seed: int) -> Image.Image:
    """Coarse colours with noise on them."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (9, 9, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), dtype=float)
    return Image.fromarray((smooth + rng.normal(0, 6, smooth.shape)).clip(0, 255).astype(np.uint8))


def squared(picture: Image.Image) -> torch.Tensor:
    """Padded in the mean colour, resized and normalised, [1, 3, 336, 336]."""
    side = max(picture.size)
    square = Image.new("RGB", (side, side), tuple(int(255 * share) for share in MEAN))
    square.paste(picture, tuple((side - length) // 2 for length in picture.size))
    resized = square.resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    values = np.asarray(resized, dtype=np.float32) / 255
    pixels = (values - np.float32(MEAN)) / np.float32(DEVIATION)
    return torch.from_numpy(pixels).permute(2, 0, 1)[None]


def released_padding(width: int, height: int) -> torch.Tensor:
    """Which of 24 x 24 patches have no CLS attention in the release, in pixels of the padded picture.

    On each padded side ceil(side / 24) pixels count to the picture; of each patch its first pixel is looked at.
    """
    side, short = max(width, height), min(width, height)
    border = -(-side // GRID)
    first, last = (side - short) // 2 - border, (side + short) // 2 + border
    looked_at = [patch * side // GRID for patch in range(GRID)]
    line = torch.tensor([width != height and not max(first, 0) <= at < last for at in looked_at])
    padding = line[:, None] if width > height else line[None]
    return padding.expand(GRID, GRID)


def found(pixels: torch.Tensor) -> torch.Tensor:
    return (patches_outside(pixels, PATCH) > 1).view(-1, GRID, GRID)


@pytest.mark.parametrize(
    ("width", "height", "lines"),
    [
        # First pixels of patches at 0, 26, 53, ..., 586, 613; the picture with its border: 53 to 586.
        (640, 480, 3),
        (480, 640, 3),
        (640, 427, 6),
        (500, 375, 4),
        (375, 500, 4),
        (1024, 768, 3),
        (1600, 900, 9),
        (640, 360, 9),
        (500, 333, 6),
        (1000, 300, 15),
        (320, 240, 3),
        (612, 612, 0),
        (640, 600, 0),
    ],
)
def test_the_padding_of_photographs_is_that_of_the_release(width, height, lines):
    expected = released_padding(width, height)
    assert expected.sum() == lines * GRID
    for seed in range(3):
        assert torch.equal(found(squared(photo(width, height, seed)))[0], expected)


def test_in_pictures_of_any_shape_a_line_of_patches_may_be_in_doubt():
    rng, equal = np.random.default_rng(0), 0
    for seed in range(40):
        width, height = rng.integers(340, 1200, 2).tolist()
        mask, expected = (
            found(squared(photo(width, height, seed)))[0],
            released_padding(width, height),
        )
        equal += torch.equal(mask, expected)
        assert (mask != expected).sum() <= GRID
    assert equal >= 38


@pytest.mark.parametrize("axis", [-2, -1])
def test_without_resizing_it_is_exact(axis):
    original = torch.randn(3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    lengths = range(20, SIDE + 1)
    pictures = []
    for length in lengths:
        before = (SIDE - length) // 2
        padded = torch.full_like(original, 0.25)
        padded.narrow(axis, before, length).copy_(original.narrow(axis, 0, length))
        pictures.append(padded)
    masks = found(torch.stack(pictures))
    for length, mask in zip(lengths, masks, strict=True):
        size = (SIDE, length) if axis == -2 else (length, SIDE)
        assert torch.equal(mask, released_padding(*size)), length


def banded(above: int, below: int, colour_below: float = 0.25) -> torch.Tensor:
    pixels = torch.randn(1, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))
    pixels[..., :above, :] = 0.25
    pixels[..., SIDE - below :, :] = colour_below
    return pixels


def test_what_is_no_padding():
    assert not patches_outside(banded(0, 0), PATCH).any()
    assert not patches_outside(banded(84, 0), PATCH).any()  # on one side alone
    assert not patches_outside(banded(84, 84, colour_below=0.5), PATCH).any()
    assert not patches_outside(torch.full((1, 3, SIDE, SIDE), 0.5), PATCH).any()
    frame = banded(84, 84)
    frame[..., :40] = frame[..., -40:] = 0.25
    assert not patches_outside(frame, PATCH).any()
    # The picture's own sky goes on where the padding ends.
    assert torch.equal(found(banded(120, 84)), found(banded(84, 84)))
    assert found(banded(84, 84)).sum() == 10 * GRID


def test_only_the_method_that_asks_sees_it():
    model = zoo.build("llava", "sdpa")
    arguments = zoo.inputs("llava", model)
    arguments["pixel_values"][:, :, :21], arguments["pixel_values"][:, :, -21:] = 0.25, 0.25
    assert observe(model, arguments).vision_outside is None
    wanted = Tower(attention=True, outside=True)
    outside = observe(model, arguments, wanted).vision_outside.view(4, 4)
    # 56 pixels: rows of patches begin at 0, 14, 28 and 42, the picture's rows are 21 to 34.
    assert outside[:, 0].tolist() == pytest.approx([21 / 14, 7 / 14, 0, 8 / 14])
    method = Watch(wanted=wanted)
    with torch.no_grad(), method(model, vision_scores=torch.ones(16)):
        model(**arguments)
    assert method.seen[0].vision_outside is None  # scores that are given are taken as they are


@functools.cache
def released_model() -> LlavaForConditionalGeneration:
    folder = golden_root()[0] / "checkpoints" / "deep336"
    return LlavaForConditionalGeneration.from_pretrained(folder).eval()


def first_kept(method: AutoPruneReference, inputs: dict, **options) -> list[list[int]]:
    model = released_model()
    with torch.no_grad(), method(model, **options) as trace:
        model(**inputs)
    return [sample.kept[1].tolist() for sample in trace.samples]


def test_the_first_cut_on_padded_pictures_is_the_one_of_the_release():
    sizes = [(640, 480), (375, 500), (400, 400)]
    pixels = torch.cat([squared(photo(*size, seed)) for seed, size in enumerate(sizes)])
    ids = torch.tensor([[1, *[IMAGE_TOKEN] * GRID**2, 5, 6, 7]] * len(sizes))
    inputs = {"input_ids": ids, "pixel_values": pixels}
    method = Watch()
    with torch.no_grad(), method(released_model()):
        released_model()(**inputs)
    scores = method.seen[0].vision_scores
    padding = torch.stack([released_padding(*size).flatten() for size in sizes])
    reference = AutoPruneReference(64)
    kept = first_kept(reference, inputs)
    assert [len(tokens) for tokens in kept] == [160] * 3
    assert kept == first_kept(reference, inputs, vision_scores=scores.masked_fill(padding, 0))
    # Without the padding's zeros other tokens win, except in the square picture.
    whole = first_kept(reference, inputs, vision_scores=scores)
    common = [len({*a} & {*b}) for a, b in zip(kept, whole, strict=True)]
    assert max(common[:2]) < 150
    assert common[2] == 160
