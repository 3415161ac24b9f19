"""Pictures that a browser sends: what is none is refused in a sentence, and nothing large is decoded."""

from __future__ import annotations

import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from autoprune.web import upload
from autoprune.web.upload import read_upload


def png_header(width: int, height: int) -> bytes:
    """A PNG that says it is so large, and holds next to nothing."""
    fields = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", fields) + chunk(b"IDAT", zlib.compress(b"\0"))


def test_a_picture_is_read_as_it_is(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (7, 9, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    assert (np.asarray(read_upload(str(tmp_path / "a.png"), tmp_path)) == pixels).all()


def test_no_picture():
    with pytest.raises(ValueError, match="there is no picture yet"):
        read_upload(None, ".")


def test_a_file_that_was_not_uploaded_is_not_read(tmp_path):
    uploads = tmp_path / "uploads"
    uploads.mkdir()
    Image.new("RGB", (9, 9)).save(tmp_path / "own.png")
    (uploads / "link.png").symlink_to(tmp_path / "own.png")
    for path in (
        "own.png",
        "uploads/../own.png",
        "uploads/link.png",
        "uploads/gone.png",
        "uploads",
    ):
        with pytest.raises(ValueError, match="not among the uploads, or no more"):
            read_upload(str(tmp_path / path), uploads)


def test_a_text_that_is_called_png(tmp_path):
    (tmp_path / "a.png").write_text("no picture")
    with pytest.raises(ValueError, match=r"^'a\.png' is not an image that can be read; give PNG"):
        read_upload(str(tmp_path / "a.png"), tmp_path)


def test_a_huge_picture_is_not_decoded(tmp_path, monkeypatch):
    (tmp_path / "a.png").write_bytes(png_header(30000, 30000))
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("it was decoded"))
    with pytest.raises(ValueError, match="more than 25 million pixels"):
        read_upload(str(tmp_path / "a.png"), tmp_path)


def test_a_truncated_picture(tmp_path):
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 90, 3), np.uint8)).save(
        tmp_path / "a.jpg"
    )
    (tmp_path / "a.jpg").write_bytes((tmp_path / "a.jpg").read_bytes()[:900])
    with pytest.raises(ValueError, match="damaged or truncated"):
        read_upload(str(tmp_path / "a.jpg"), tmp_path)


def test_too_many_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(upload, "MAX_BYTES", 2**20)
    (tmp_path / "a.png").write_bytes(bytes(2**20 + 1))
    with pytest.raises(ValueError, match=r"1.0 MiB; 1 are taken at most"):
        read_upload(str(tmp_path / "a.png"), tmp_path)
