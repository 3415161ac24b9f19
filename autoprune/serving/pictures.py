"""Pictures of a request: from `data:` addresses, and from elsewhere where the server allows it."""

from __future__ import annotations

import base64
import binascii
import io
import re
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from ..images import decode_image
from .errors import RequestError
from .fetch import Fetcher
from .limits import Limits
from .messages import Part

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
_DATA = re.compile(r"data:image/[a-z0-9.+-]+;base64,", re.IGNORECASE)


@dataclass(frozen=True)
class Pictures:
    """Reads the pictures of requests within the limits.

    Args:
        folder: a folder whose files may be named by `file:` addresses; None allows none.
        fetcher: fetches `http:` addresses; None allows none.
    """

    limits: Limits
    folder: Path | None = None
    fetcher: Fetcher | None = None

    def load(self, part: Part) -> Image.Image:
        """The picture of a part, as RGB.

        Raises:
            RequestError: its address is not allowed, or it is no picture, damaged or too large.
        """
        data = self._bytes(part.picture or "", part.path)
        try:
            return decode_image(io.BytesIO(data), part.path, FORMATS, self.limits.picture_pixels)
        except ValueError as error:
            raise RequestError(str(error), param=part.path) from error

    def _bytes(self, address: str, path: str) -> bytes:
        """The encoded picture."""
        start = _DATA.match(address)
        if start is not None:
            return self._decoded(address[start.end() :], path)
        if address[:5].lower() == "file:" and self.folder is not None:
            return self._read(self.folder, address, path)
        if address[:4].lower() == "http" and self.fetcher is not None:
            return self.fetcher.fetch(address, path)
        raise RequestError(self._what_is_taken(address, path), param=path)

    def _what_is_taken(self, address: str, path: str) -> str:
        scheme, colon, _ = address[:20].partition(":")
        got = f"{scheme}: addresses are not read" if colon else "this is no address"
        if scheme.lower() == "data":
            got = "this is data of another kind"
        also = "" if self.folder is None else ", or file:NAME of a file in the server's folder"
        return f"{path} must be data:image/png;base64,... or of another picture{also}; {got}"

    def _decoded(self, text: str, path: str) -> bytes:
        if len(text) > self.limits.picture_bytes * 4 // 3 + 4:
            raise self._too_large(path)
        try:
            data = base64.b64decode(text, validate=True)
        except (binascii.Error, ValueError):
            raise RequestError(f"{path} is not valid base64", param=path) from None
        if not data:
            raise RequestError(f"{path} holds no data behind base64,", param=path)
        return data

    def _too_large(self, path: str) -> RequestError:
        limit = self.limits.picture_bytes
        return RequestError(
            f"{path} is too large: more than {limit} bytes; resize the picture first",
            status=413,
            param=path,
        )

    def _read(self, folder: Path, address: str, path: str) -> bytes:
        """A file of the folder; links that lead out of it count as outside."""
        name = address[5:].removeprefix("//")
        outside = RequestError(
            f"{path} names no file in the server's folder; write file:NAME", param=path
        )
        try:
            found = (folder / name).resolve()
            if not found.is_relative_to(folder.resolve()) or not found.is_file():
                raise outside
            if found.stat().st_size > self.limits.picture_bytes:
                raise self._too_large(path)
            return found.read_bytes()
        except (OSError, ValueError) as error:
            raise outside from error
