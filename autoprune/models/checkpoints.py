"""What converters of checkpoints have in common: files that may be damaged, and the folder that is written."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def one_error(action: str) -> Iterator[None]:
    """Turn whatever a library raises into a ValueError of one line: damaged files raise many kinds.

    Args:
        action: what stands before the reason, such as "cannot read config.json".
    """
    try:
        yield
    except Exception as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{action} ({type(error).__name__}: {reason})") from error


def read_object(path: Path) -> dict[str, Any]:
    """The object in a json file.

    Raises:
        ValueError: it cannot be read, or holds something else.
    """
    with one_error(f"{str(path)!r} cannot be read"):
        found = json.loads(path.read_text("utf-8"))
    if not isinstance(found, dict):
        raise ValueError(f"{str(path)!r} holds no object of json, but a {type(found).__name__}")
    return found


def check_output(output: Path) -> None:
    """Raise ValueError where something is in the way: nothing is overwritten, least of all the checkpoint."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"{str(output)!r} is there already; give a new or empty folder")
