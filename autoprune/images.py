"""Pictures from files, with errors that say what is wrong with them."""

from __future__ import annotations

import struct
import warnings
from pathlib import Path

from PIL import Image, ImageOps, UnidentifiedImageError

MAX_ASPECT_RATIO = 200
"""Processors scale the shorter side up: a thread of pixels would become a gigantic picture."""


def load_image(path: Path) -> Image.Image:
    """The picture of a file as RGB, turned upright as its camera noted.

    Raises:
        ValueError: the file is missing, no image, truncated, or too large to be decoded safely.
    """
    if not path.exists():
        raise ValueError(f"there is no image file {str(path)!r}")
    if path.is_dir():
        raise ValueError(f"{str(path)!r} is a folder, expected an image file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                picture = ImageOps.exif_transpose(image).convert("RGB")
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        limit = Image.MAX_IMAGE_PIXELS or 0
        raise ValueError(
            f"image {str(path)!r} is too large: more than "
            f"{limit / 1e6:.0f} million pixels; resize it first"
        ) from error
    except UnidentifiedImageError as error:
        raise ValueError(f"{str(path)!r} is not an image that can be read") from error
    except PermissionError as error:
        raise ValueError(f"no permission to read {str(path)!r}") from error
    except (OSError, SyntaxError, ValueError, EOFError, struct.error) as error:
        raise ValueError(f"image {str(path)!r} is damaged or truncated: {error}") from error
    short, long = sorted(picture.size)
    if long > MAX_ASPECT_RATIO * short:
        raise ValueError(
            f"image {str(path)!r} is {picture.width} x {picture.height} pixels; its sides may "
            f"differ by a factor of {MAX_ASPECT_RATIO} at most, crop it first"
        )
    return picture
