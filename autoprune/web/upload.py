"""Pictures that a browser sends."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from ..images import decode_image

MAX_BYTES = 8 * 2**20
MAX_PIXELS = 25_000_000
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")


def read_upload(path: str | None, folder: str | Path) -> Image.Image:
    """The picture of an uploaded file, as RGB.

    Its size is read from the header, so that nothing large is decoded.

    Args:
        folder: where uploads are. Who speaks to the server without the page can name any of its files.

    Raises:
        ValueError: no file, one that was not uploaded or is deleted, none of these formats, damaged, or too
            large.
    """
    if path is None:
        raise ValueError("there is no picture yet; upload one, or draw a scene")
    file = Path(path).resolve()
    if not file.is_relative_to(Path(folder).resolve()) or not file.is_file():
        raise ValueError("the picture is not among the uploads, or no more; upload it once more")
    if file.stat().st_size > MAX_BYTES:
        raise ValueError(
            f"the picture has {file.stat().st_size / 2**20:.1f} MiB; {MAX_BYTES // 2**20} are taken at most"
        )
    with file.open("rb") as opened:
        return decode_image(opened, repr(file.name), FORMATS, MAX_PIXELS)
