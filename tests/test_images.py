"""Every picture becomes RGB as a viewer would show it, or is refused in one sentence."""

from __future__ import annotations

import io
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from autoprune.images import load_image

GREY = np.arange(256, dtype=np.uint8).reshape(16, 16)
SIXTEEN = GREY.astype(np.uint16) * 257
BLACK, WHITE = (0, 0, 0), (255, 255, 255)


def loaded(tmp_path, name, picture, **options):
    """The picture as it comes back from a file, as an array [height, width, 3]."""
    picture.save(tmp_path / name, **options)
    image = load_image(tmp_path / name)
    assert image.mode == "RGB"
    return np.asarray(image)


def as_grey(pixels):
    assert (pixels == pixels[..., :1]).all()
    return pixels[..., 0]


@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.pgm"])
def test_grey_of_16_bits_is_rescaled_and_not_clipped(tmp_path, name):
    assert (as_grey(loaded(tmp_path, name, Image.fromarray(SIXTEEN))) == GREY).all()


def test_big_endian_grey_of_16_bits(tmp_path):
    pixels = loaded(tmp_path, "a.tif", Image.fromarray(SIXTEEN.astype(">u2")))
    assert (as_grey(pixels) == GREY).all()


def test_a_tiff_whose_zero_is_white_is_turned_round(tmp_path):
    pixels = loaded(tmp_path, "a.tif", Image.fromarray(SIXTEEN), tiffinfo={262: 0})
    assert (as_grey(pixels) == 255 - GREY).all()


def test_floating_point_between_0_and_1_is_rescaled(tmp_path):
    picture = Image.fromarray((GREY / 255).astype(np.float32))
    assert (as_grey(loaded(tmp_path, "a.tif", picture)) == GREY).all()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (GREY.astype(np.float32), "floating-point values that are not between 0 and 1"),
        (np.full((4, 4), np.nan, np.float32), "floating-point values that are not between 0 and 1"),
        (np.full((4, 4), -0.1, np.float32), "floating-point values that are not between 0 and 1"),
        (GREY.astype(np.int32), "whole numbers of 32 bits"),
    ],
    ids=["floats to 255", "no numbers", "negative", "32 bits"],
)
def test_values_whose_white_is_not_known_are_refused(tmp_path, values, message):
    with pytest.raises(ValueError, match=message):
        loaded(tmp_path, "a.tif", Image.fromarray(values))


def palette():
    picture = Image.new("P", (4, 4), 1)
    picture.putpalette([9, 9, 9, 200, 0, 0])
    return picture


@pytest.mark.parametrize(
    ("picture", "options", "seen"),
    [
        (Image.new("RGBA", (4, 4), (0, 0, 0, 0)), {}, WHITE),
        (Image.new("RGBA", (4, 4), (10, 20, 30, 255)), {}, (10, 20, 30)),
        (Image.new("RGBA", (4, 4), (200, 100, 0, 51)), {}, (244, 224, 204)),
        (Image.new("LA", (4, 4), (0, 0)), {}, WHITE),
        (Image.new("LA", (4, 4), (7, 255)), {}, (7, 7, 7)),
        (palette(), {}, (200, 0, 0)),
        (palette(), {"transparency": 1}, WHITE),
        (palette(), {"transparency": bytes([255, 51])}, (244, 204, 204)),
        (Image.new("RGB", (4, 4), (1, 2, 3)), {"transparency": (1, 2, 3)}, WHITE),
        (Image.new("L", (4, 4), 7), {"transparency": 7}, WHITE),
        (Image.new("1", (4, 4), 0), {"transparency": 0}, WHITE),
        (Image.fromarray(SIXTEEN[:1, :1]), {"transparency": 0}, WHITE),
    ],
    ids=lambda value: value.mode if isinstance(value, Image.Image) else None,
)
def test_what_is_transparent_lies_on_white(tmp_path, picture, options, seen):
    assert loaded(tmp_path, "a.png", picture, **options)[0, 0].tolist() == list(seen)


def test_a_black_drawing_on_nothing_is_black_on_white(tmp_path):
    drawing = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    drawing.putpixel((2, 5), (0, 0, 0, 255))
    pixels = loaded(tmp_path, "a.png", drawing)
    assert tuple(pixels[5, 2]) == BLACK
    assert (pixels == 255).all(axis=-1).sum() == 63


@pytest.mark.parametrize("name", ["a.jpg", "a.tif"])
def test_colours_for_print_are_converted(tmp_path, name):
    red = loaded(tmp_path, name, Image.new("CMYK", (8, 8), (0, 255, 255, 0)))
    assert np.abs(red[0, 0].astype(int) - [255, 0, 0]).max() <= 2


def test_colours_that_pillow_cannot_convert_are_named(tmp_path, monkeypatch):
    Image.new("CMYK", (4, 4)).save(tmp_path / "a.tif")

    def refuse(*_):
        raise ValueError("conversion not supported")

    monkeypatch.setattr(Image.Image, "convert", refuse)
    with pytest.raises(ValueError, match="colours of mode CMYK, which cannot be converted"):
        load_image(tmp_path / "a.tif")


@pytest.mark.parametrize(("name", "mode"), [("a.jpg", "RGB"), ("a.png", "L"), ("a.tif", "I;16")])
def test_a_picture_is_turned_as_its_camera_noted(tmp_path, name, mode):
    exif = Image.Exif()
    exif[0x0112] = 6  # turned a quarter to the left
    shades = Image.fromarray(SIXTEEN[:8]) if mode == "I;16" else None
    shades = shades or Image.fromarray(GREY[:8]).convert(mode)
    pixels = loaded(tmp_path, name, shades, exif=exif)
    assert pixels.shape == (16, 8, 3)
    assert np.abs(as_grey(pixels)[0].astype(int) - GREY[:8, 0][::-1]).max() <= 3


def test_damaged_notes_of_a_camera_do_not_matter(tmp_path):
    pixels = loaded(tmp_path, "a.jpg", Image.new("RGB", (8, 8), WHITE), exif=b"Exif\0\0MM\0*\0")
    assert (pixels == 255).all()


def piped(monkeypatch, content, terminal=False):
    stream = SimpleNamespace(buffer=io.BytesIO(content), isatty=lambda: terminal)
    monkeypatch.setattr(sys, "stdin", stream)


def test_a_dash_is_standard_input(tmp_path, monkeypatch):
    Image.fromarray(GREY).save(tmp_path / "a.png")
    piped(monkeypatch, (tmp_path / "a.png").read_bytes())
    assert (as_grey(np.asarray(load_image("-"))) == GREY).all()


def test_standard_input_without_a_picture_is_refused(monkeypatch):
    piped(monkeypatch, b"text")
    with pytest.raises(ValueError, match=r"'-' \(standard input\) is not an image"):
        load_image("-")
    piped(monkeypatch, b"", terminal=True)
    with pytest.raises(ValueError, match="pipe one in"):
        load_image("-")


@pytest.mark.parametrize(
    "url", ["https://example.com/a.png", "s3://bucket/a.png", "data:image/png;base64,iVBOR"]
)
def test_a_url_is_refused_by_its_whole_name(url):
    with pytest.raises(ValueError, match="URLs are not fetched") as refused:
        load_image(url)
    assert repr(url) in str(refused.value)


def test_a_name_as_long_as_a_picture_is_shortened():
    with pytest.raises(ValueError, match="there is no image file") as refused:
        load_image("x" * 100_000)
    assert len(str(refused.value)) < 200
