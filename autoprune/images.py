"""Pictures from files, with errors that say what is wrong with them."""

from __future__ import annotations

import io
import re
import struct
import sys
import warnings
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

MAX_ASPECT_RATIO = 200
"""Processors scale the shorter side up: a thread of pixels would become a gigantic picture."""

STANDARD_INPUT = "-"

_URL = re.compile(r"[a-z][a-z0-9+.-]+://|data:", re.IGNORECASE)
_SHOWN = 100
_SIXTEEN_BITS = ("PNG", "PPM", "JPEG2000")
"""Formats whose whole numbers end at 65535, as Pillow reads them."""
_BOMB_WARNING = Image.DecompressionBombWarning
_TIFF_BITS, _TIFF_MEANING, _WHITE_IS_ZERO = 258, 262, 0


def load_image(source: str | Path | bytes, plain: bool = False) -> Image.Image:
    """A picture as RGB, upright as its camera noted, with white behind what is transparent.

    Grey of 16 bits is rescaled to 8, and so are floating-point values between 0 and 1. Of an
    animation or a file of several pages, this is the first picture.

    Args:
        source: a file, "-" for standard input, or the content of a file.
        plain: convert it to RGB as Pillow does and no more, which is what the scripts of most papers do: not
            turned upright, and what is transparent shows the colour that lies under it.

    Raises:
        ValueError: there is no such file, it holds no picture or a damaged one, its values cannot be
            told from black and white, it is too large to be decoded safely, or it is a URL.
    """
    name = _shown(source)
    check_source(source)
    try:
        file = _opened(source)
    except PermissionError as error:
        raise ValueError(f"no permission to read {name}") from error
    except OSError as error:
        raise ValueError(f"image {name} cannot be opened: {error}") from error
    with file:
        return decode_image(file, name, plain=plain)


def decode_image(
    file: BinaryIO,
    name: str,
    formats: tuple[str, ...] | None = None,
    max_pixels: int | None = None,
    plain: bool = False,
) -> Image.Image:
    """The picture in an open file, as `load_image` gives it.

    Args:
        name: how messages call it.
        formats: Pillow's names of those that are tried, as "PNG"; None tries all.
        max_pixels: width times height at most, as the header states them: nothing is decoded before. None is
            Pillow's own limit.
        plain: as for `load_image`.

    Raises:
        ValueError: it is no picture, damaged, or too large, or its values cannot be told from black and white.
    """
    limit = max_pixels or Image.MAX_IMAGE_PIXELS or 0
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error" if max_pixels is None else "ignore", _BOMB_WARNING)
            with Image.open(file, formats=formats) as image:
                if max_pixels is not None and image.width * image.height > max_pixels:
                    raise Image.DecompressionBombError
                image.load()
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise ValueError(
            f"image {name} is too large: more than "
            f"{limit / 1e6:.4g} million pixels; resize it first"
        ) from error
    except UnidentifiedImageError as error:
        expected = "a PNG or JPEG file" if formats is None else " or ".join(formats)
        raise ValueError(f"{name} is not an image that can be read; give {expected}") from error
    except (OSError, SyntaxError, ValueError, EOFError, struct.error) as error:
        raise ValueError(f"image {name} is damaged or truncated: {error}") from error
    _check_shape(image, name)
    if plain:
        return image.convert("RGB")
    return _as_rgb(_upright(image), image, name)


def check_source(source: str | Path | bytes) -> None:
    """Raise ValueError where no picture can come from; nothing is read."""
    if isinstance(source, bytes):
        return
    name, text = _shown(source), str(source)
    if text == STANDARD_INPUT:
        if sys.stdin is None or sys.stdin.isatty():
            raise ValueError("standard input holds no picture; pipe one in, or give a file")
        return
    if _URL.match(text):
        raise ValueError(f"{name} is a URL, and URLs are not fetched; download the picture first")
    try:
        found, folder = bool(text) and Path(text).exists(), Path(text).is_dir()
    except (OSError, ValueError):
        # A name that is too long for the system, or holds a null character.
        found = folder = False
    if not found:
        raise ValueError(f"there is no image file {name}")
    if folder:
        raise ValueError(f"{name} is a folder, expected an image file")


def _opened(source: str | Path | bytes) -> BinaryIO:
    if isinstance(source, bytes):
        return io.BytesIO(source)
    # Given a name, Pillow 13 garbles uncompressed TIFF files that are turned by a quarter.
    return (
        io.BytesIO(sys.stdin.buffer.read()) if str(source) == STANDARD_INPUT else open(source, "rb")
    )


def _shown(source: str | Path | bytes) -> str:
    """How messages call it; a name may be as long as a picture in base64."""
    if isinstance(source, bytes):
        return f"of {len(source)} bytes"
    text = str(source)
    if text == STANDARD_INPUT:
        return "'-' (standard input)"
    return repr(text if len(text) <= _SHOWN else f"{text[:_SHOWN]}...")


def _check_shape(image: Image.Image, name: str) -> None:
    short, long = sorted(image.size)
    if long > MAX_ASPECT_RATIO * short:
        raise ValueError(
            f"image {name} is {image.width} x {image.height} pixels; its sides may "
            f"differ by a factor of {MAX_ASPECT_RATIO} at most, crop it first"
        )


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except (OSError, SyntaxError, ValueError, KeyError, TypeError, EOFError, struct.error):
        # The notes of the camera are damaged, but the picture is not.
        return image


def _as_rgb(image: Image.Image, file: Image.Image, name: str) -> Image.Image:
    """`file` is the picture as it was opened: turning it upright loses what the file says of it."""
    if image.mode == "F" or image.mode.startswith("I"):
        image = _eight_bits(image, file, name)
    try:
        if image.has_transparency_data:
            opaque = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(opaque, image.convert("RGBA"))
        return image.convert("RGB")
    except ValueError as error:
        raise ValueError(
            f"image {name} has colours of mode {image.mode}, which cannot be converted; save it as RGB"
        ) from error


def _eight_bits(image: Image.Image, file: Image.Image, name: str) -> Image.Image:
    """Grey of other numbers than bytes, rescaled; Pillow's own conversion would clip it.

    Raises:
        ValueError: it cannot be known which number is white.
    """
    values = np.asarray(image).astype(np.float32)
    tags: Any = getattr(file, "tag_v2", {})
    if image.mode == "F":
        if not (np.isfinite(values).all() and values.min() >= 0 and values.max() <= 1):
            raise ValueError(
                f"image {name} holds floating-point values that are not between 0 and 1; "
                "rescale them, or save it with 8 bits"
            )
        white = 1.0
    elif image.mode.startswith("I;16") or file.format in _SIXTEEN_BITS:
        white = 2.0 ** int(tags.get(_TIFF_BITS, (16,))[0]) - 1
    else:
        raise ValueError(
            f"image {name} holds whole numbers of 32 bits, and which of them is white is not "
            "known; save it with 8 or 16 bits"
        )
    grey = values / white
    if tags.get(_TIFF_MEANING) == _WHITE_IS_ZERO:
        grey = 1 - grey
    if isinstance(file.info.get("transparency"), int):
        grey[values == file.info["transparency"]] = 1
    return Image.fromarray((grey.clip(0, 1) * 255).round().astype(np.uint8))
