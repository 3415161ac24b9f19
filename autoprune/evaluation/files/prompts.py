"""A question as the model is shown it: the words around it, and its picture."""

from __future__ import annotations

import base64
import binascii
from typing import Any

from PIL import Image

from ...images import load_image
from ..prompts import Conversation, prompt_text
from .questions import Question

TEMPLATE = "template"
_VICUNA = {
    "vicuna_v1": "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions.",
    "llava_v1": "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions.",
}
_ALSO_CALLED = {"v1": "vicuna_v1"}
_ONE_SQUARE = ("llava", "vipllava")
"""Families that are shown a picture as one square."""
CONVERSATIONS = (TEMPLATE, *_VICUNA)


def conversation(name: str) -> str:
    """The name of a conversation, one of `CONVERSATIONS`.

    Raises:
        ValueError: it is none of them.
    """
    name = _ALSO_CALLED.get(name, name)
    if name not in CONVERSATIONS:
        raise ValueError(
            f"conversation {name!r} is not known; use vicuna_v1 or llava_v1, which LLaVA-1.5 was trained on, "
            f"or {TEMPLATE} for the model's own chat template"
        )
    return name


def fitting(name: str, processor: Any) -> str:
    """`name`, or `TEMPLATE` for a model whose own template shows that it was trained on another one."""
    if name == TEMPLATE or not getattr(processor, "chat_template", None):
        return name
    # Written out: LLaVA's own template has `message['role'].upper()` in it.
    return name if "USER:" in _own_prompt(processor, "?", True) else TEMPLATE


def prompt(processor: Any, conversation: str, question: str, has_image: bool) -> str:
    """The text of a prompt; LLaVA's are word for word those of its `conv_templates`."""
    if conversation == TEMPLATE:
        return _own_prompt(processor, question, has_image)
    place = f"{getattr(processor, 'image_token', '<image>')}\n" if has_image else ""
    return f"{_VICUNA[conversation]} USER: {place}{question} ASSISTANT:"


def _own_prompt(processor: Any, question: str, has_image: bool) -> str:
    """By the processor's own template."""
    content = [{"type": "image"}] if has_image else []
    content.append({"type": "text", "text": question})
    return prompt_text(processor, Conversation([{"role": "user", "content": content}]))


def picture(question: Question, squared: tuple[int, ...] | None, plain: bool) -> Image.Image | None:
    """The picture of a question.

    Args:
        squared: the colour to pad it with to a square; None leaves it as it is.
        plain: convert it to RGB as LLaVA does, see `load_image`.

    Raises:
        ValueError: there is no such picture, or none that can be read.
    """
    if question.image is None:
        return None
    source = question.image
    if isinstance(source, bytes):
        try:
            source = base64.b64decode(source, validate=True)
        except binascii.Error as error:
            raise ValueError(f"image: no base64: {error}") from error
    image = load_image(source, plain=plain)
    return image if squared is None else square(image, squared)


def square(image: Image.Image, colour: tuple[int, ...]) -> Image.Image:
    """The picture in the middle of a square, as LLaVA's `image_aspect_ratio: pad` has it."""
    side = max(image.size)
    if image.size == (side, side):
        return image
    whole = Image.new(image.mode, (side, side), colour)
    whole.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return whole


def padding_colour(model: Any, processor: Any) -> tuple[int, ...] | None:
    """What LLaVA pads pictures for this model with: the mean colour its tower was trained on.

    None where pictures are not to be padded here: the model is no LLaVA of one square picture, or its own
    processor pads.
    """
    pictures: Any = getattr(processor, "image_processor", None)
    if model.config.model_type not in _ONE_SQUARE or getattr(pictures, "do_pad", False):
        return None
    return tuple(int(share * 255) for share in pictures.image_mean)
