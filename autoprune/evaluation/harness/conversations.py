"""Conversations from the messages of the harness, whose parts carry pictures and videos themselves."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from PIL import Image

from ...images import load_image
from ..prompts import Conversation
from .video import read_frames

MAX_FRAMES = 32
"""Frames of each video, as most published comparisons take them."""


def conversation_of(
    messages: Sequence[Mapping[str, Any]],
    takes_videos: bool = False,
    max_frames: int = MAX_FRAMES,
    system_prompt: str | None = None,
) -> Conversation:
    """What a task of the harness asks.

    Args:
        messages: roles, and content of parts {"type": "text", "text"} or {"type": "image" | "video", "url"}.
        takes_videos: hand a video to the processor as one; otherwise its frames are pictures in a row.

    Raises:
        ValueError: audio, or a picture or video that cannot be read.
        ImportError: there is no decoder of videos.
    """
    found: dict[str, list[Any]] = {"image": [], "video": []}
    written: list[dict[str, Any]] = []
    if system_prompt:
        written.append({"role": "system", "content": [{"type": "text", "text": system_prompt}]})
    for message in messages:
        content = message["content"]
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        kept = [own for part in parts for own in _parts(part, takes_videos, max_frames, found)]
        written.append({"role": message["role"], "content": kept})
    return Conversation(written, found["image"], found["video"])


def of_visuals(visuals: Sequence[Any], text: str) -> list[dict[str, Any]]:
    """One question as messages: what a task shows, then its text."""
    shown = [
        {"type": "video" if isinstance(visual, str) else "image", "url": visual}
        for visual in visuals
    ]
    return [{"role": "user", "content": [*shown, {"type": "text", "text": text}]}]


def _parts(
    part: Mapping[str, Any], takes_videos: bool, max_frames: int, found: dict[str, list[Any]]
) -> Iterator[dict[str, Any]]:
    """The part as a chat template takes it; its picture or video goes to `found`."""
    kind = part["type"]
    if kind == "text":
        yield {"type": "text", "text": part["text"]}
    elif kind == "image":
        found["image"].append(_picture(part["url"]))
        yield {"type": "image"}
    elif kind == "video":
        frames = _frames(part, max_frames)
        found["video" if takes_videos else "image"].extend([frames] if takes_videos else frames)
        yield from [{"type": "video"}] if takes_videos else [{"type": "image"}] * len(frames)
    else:
        raise ValueError(f"the task asks about {kind}, and only pictures and videos are pruned")


def _picture(source: Any) -> Image.Image:
    return source.convert("RGB") if isinstance(source, Image.Image) else load_image(source)


def _frames(part: Mapping[str, Any], count: int) -> list[Image.Image]:
    url, start, end = part["url"], part.get("start_time"), part.get("end_time")
    if isinstance(url, Mapping):
        start, end = url.get("video_start", start), url.get("video_end", end)
        url = url.get("url") or url.get("path") or url.get("video")
    if isinstance(url, Sequence) and not isinstance(url, str):
        return [_picture(frame) for frame in url]
    return read_frames(url, count, start, end)
