"""Frames of a video file, evenly spread."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


def read_frames(
    path: str | Path, count: int, start: float | None = None, end: float | None = None
) -> list[Image.Image]:
    """Up to `count` frames, the first and the last among them.

    Args:
        start, end: seconds; None for the whole video.

    Raises:
        ImportError: no decoder is installed.
        ValueError: no such file, or none that can be decoded.
    """
    try:
        import av
    except ImportError as error:
        raise ImportError(f"reading the video {str(path)!r} needs av: pip install av") from error
    if not Path(path).is_file():
        raise ValueError(f"there is no video file {str(path)!r}")
    try:
        total = sum(1 for _ in _frames(av, path, start, end))
        # Two passes: a long video in memory would not fit.
        wanted = set(np.linspace(0, total - 1, min(count, total)).round().astype(int).tolist())
        frames = _frames(av, path, start, end)
        chosen = [frame.to_image() for i, frame in enumerate(frames) if i in wanted]
    except (OSError, ValueError) as error:
        raise ValueError(f"the video {str(path)!r} cannot be decoded: {error}") from error
    if not chosen:
        raise ValueError(f"the video {str(path)!r} has no frame between {start} s and {end} s")
    return chosen


def _frames(av: Any, path: str | Path, start: float | None, end: float | None) -> Iterator[Any]:
    with av.open(str(path)) as container:
        for frame in container.decode(video=0):
            if start is not None and frame.time < start:
                continue
            if end is not None and frame.time > end:
                break
            yield frame
