"""Prompts of text, pictures and videos as model inputs: chat template, processor, left padding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

Message = Mapping[str, Any]
"""A role and its content, a list of parts as chat templates take them: {"type": "text", "text": ...},
{"type": "image"}, {"type": "video"}."""


@dataclass(frozen=True)
class Conversation:
    """What a model is asked: messages, and the pictures and videos that their parts stand for, in order.

    videos: each the frames of one, as pictures.
    """

    messages: Sequence[Message]
    images: Sequence[Image.Image] = ()
    videos: Sequence[Sequence[Image.Image]] = ()


def tokenizer_of(processor: Any) -> Any:
    """The tokenizer of a processor; a tokenizer is its own."""
    return getattr(processor, "tokenizer", processor)


def can_pad(processor: Any) -> bool:
    """Whether prompts of different lengths can be asked together."""
    return getattr(tokenizer_of(processor), "pad_token_id", None) is not None


def takes_videos(processor: Any) -> bool:
    """Whether the processor makes inputs of videos; otherwise frames are pictures."""
    return getattr(processor, "video_processor", None) is not None


def prompt_text(processor: Any, conversation: Conversation) -> str:
    """A conversation as the text that the model reads, up to where its answer starts.

    Raises:
        ValueError: the processor has no chat template, and there is more than one message.
    """
    if getattr(processor, "chat_template", None):
        text: str = processor.apply_chat_template(
            list(conversation.messages), add_generation_prompt=True, tokenize=False
        )
        return text
    if len(conversation.messages) != 1:
        raise ValueError(
            f"the processor has no chat template, so it cannot join {len(conversation.messages)} messages; "
            "use a checkpoint that has one, or ask one question without a system prompt"
        )
    image = getattr(processor, "image_token", "<image>")
    parts = conversation.messages[0]["content"]
    return "".join(part["text"] if part["type"] == "text" else f"{image}\n" for part in parts)


def encode(processor: Any, conversations: Sequence[Conversation]) -> Any:
    """Inputs of a left-padded batch, on the CPU.

    Args:
        conversations: all with as many pictures and videos as the first, or none with any.
    """
    texts = [prompt_text(processor, conversation) for conversation in conversations]
    images = [list(own.images) for own in conversations] if conversations[0].images else None
    videos = None
    if conversations[0].videos:
        videos = [[list(frames) for frames in own.videos] for own in conversations]
    return encode_texts(processor, texts, images, videos)


def encode_texts(
    processor: Any,
    texts: Sequence[str],
    images: Sequence[Sequence[Image.Image]] | None = None,
    videos: Sequence[Sequence[Sequence[Image.Image]]] | None = None,
) -> Any:
    """Inputs of a left-padded batch, on the CPU.

    Args:
        texts: the prompts, with a placeholder where a picture or video stands.
        images, videos: those of each prompt; None where no prompt has any.
    """
    options: dict[str, Any] = {}
    if len(texts) > 1:
        options.update(padding=True, padding_side="left")
    start = getattr(tokenizer_of(processor), "bos_token", None)
    if start and texts[0].startswith(start):
        # The template has written it already.
        options.update(add_special_tokens=False)
    if images is not None:
        options.update(images=images)
    if videos is not None:
        # The frames were chosen where the video was read.
        options.update(videos=videos, do_sample_frames=False)
    return processor(text=list(texts), return_tensors="pt", **options)
