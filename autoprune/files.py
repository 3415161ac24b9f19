"""Files that appear whole or not at all."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO


def write_whole(path: str | os.PathLike[str], content: str | bytes) -> None:
    """Write a file through a temporary one beside it: a failure leaves nothing half-written.

    Raises:
        OSError: the folder does not exist or cannot be written.
    """
    with open_whole(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


@contextlib.contextmanager
def open_whole(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """A file to write that takes its place when the block ends; a failure leaves nothing half-written.

    Raises:
        OSError: the folder does not exist or cannot be written.
    """
    path = Path(path)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
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
    check_file(path)
    return path


def check_file(path: Path) -> None:
    """Raise ValueError where no file of that name can be written; its folder must exist."""
    with _named(path):
        if path.is_dir():
            raise ValueError(f"{str(path)!r} is a folder; give the name of a file in it")
        if not path.parent.is_dir():
            raise ValueError(
                f"cannot write {str(path)!r}: there is no folder {str(path.parent)!r}; "
                "create it first"
            )
        _try(path.parent)


def check_folder(folder: str | os.PathLike[str]) -> None:
    """Raise ValueError where nothing can be written into a folder; one to be made counts as well.

    Nothing is made. `make_folder` makes it.
    """
    folder = Path(folder)
    with _named(folder):
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"{str(folder)!r} is a file; give a folder")
        # What is to be made is made in the nearest folder that is there.
        there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        _try(there)


def make_folder(folder: str | os.PathLike[str]) -> Path:
    """A folder that can be written into, made if it is not there, with those above it.

    Raises:
        ValueError: it is a file, or cannot be made or written.
    """
    check_folder(folder)
    with _named(Path(folder)):
        Path(folder).mkdir(parents=True, exist_ok=True)
    return Path(folder)


def _try(folder: Path) -> None:
    tempfile.TemporaryFile(dir=folder).close()


@contextlib.contextmanager
def _named(path: Path) -> Iterator[None]:
    """Turn what the system says into one sentence that names the path."""
    try:
        yield
    except OSError as error:
        raise ValueError(
            f"cannot write {str(path)!r} ({error.strerror}); choose another place"
        ) from error
