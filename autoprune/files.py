"""Files that appear whole or not at all."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def write_whole(path: str | os.PathLike[str], content: str | bytes) -> None:
    """Write a file through a temporary one beside it: a failure leaves nothing half-written.

    Raises:
        OSError: the folder does not exist or cannot be written.
    """
    path = Path(path)
    data = content.encode() if isinstance(content, str) else content
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def check_picture_path(path: str | os.PathLike[str]) -> Path:
    """A path that a picture can be written to, checked before the work that fills it.

    Raises:
        ValueError: it does not end in .png, is a folder, or lies in a folder that does not exist or
            cannot be written.
    """
    path = Path(path)
    if path.suffix.lower() != ".png":
        raise ValueError(
            f"pictures are written as PNG, got {str(path)!r}; choose a name ending in .png"
        )
    if path.is_dir():
        raise ValueError(f"{str(path)!r} is a folder; give the name of a file in it")
    if not path.parent.is_dir():
        raise ValueError(
            f"cannot write {str(path)!r}: there is no folder {str(path.parent)!r}; create it first"
        )
    check_folder(path.parent)
    return path


def check_folder(folder: str | os.PathLike[str]) -> None:
    """Raise ValueError where nothing can be written into a folder."""
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ValueError(
            f"cannot write into {str(folder)!r} ({error.strerror}); choose another folder"
        ) from error
