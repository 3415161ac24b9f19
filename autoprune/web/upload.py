"""Pictures that a browser sends."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from ..images import decode_image

MAX_BYTES = 8 * 2**20
MAX_PIXELS = 25_000_000
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")


def read_upload(path: str | None) -> Image.Image:
    """The picture of an uploaded file, as RGB.

    Its size is read from the header, so that nothing large is decoded.

    Raises:
        ValueError: no file, none of these formats, damaged, or too large.
    """
    if path is None:
        raise ValueError("there is no picture yet; upload one, or draw a scene")
    file = Path(path)
    if file.stat().st_size > MAX_BYTES:
        raise ValueError(
            f"the picture has {file.stat().st_size / 2**20:.1f} MiB; {MAX_BYTES // 2**20} are taken at most"
        )
    with file.open("rb") as opened:
        return decode_image(opened, "you uploaded", FORMATS, MAX_PIXELS)
