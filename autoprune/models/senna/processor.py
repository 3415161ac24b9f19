"""From six pictures and a question to Senna's inputs, as its authors' code prepares them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from PIL import Image
from transformers import LlavaProcessor

CAMERAS = (
    "CAM_FRONT",
    "CAM_FRONT_RIGHT",
    "CAM_FRONT_LEFT",
    "CAM_BACK",
    "CAM_BACK_LEFT",
    "CAM_BACK_RIGHT",
)
"""nuScenes' cameras, in the order in which Senna was trained to see their pictures."""

LABELS = (
    "FRONT VIEW",
    "FRONT LEFT VIEW",
    "FRONT RIGHT VIEW",
    "BACK LEFT VIEW",
    "BACK RIGHT VIEW",
    "BACK VIEW",
)
"""What stands before the pictures in the prompt. From the second on they name other cameras than `CAMERAS`: the
training data do so, and a model that learned from these needs the same."""

TEMPLATE = """\
A chat between a curious human and an artificial intelligence assistant. The assistant gives helpful, \
detailed, and polite answers to the human's questions.{% for message in messages %} \
{% if message['role'] == 'user' %}USER{% else %}ASSISTANT{% endif %}: \
{% if message['content'] is string %}{{ message['content'] }}{% else %}\
{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>
{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}\
{% if message['role'] != 'user' %}</s>{% endif %}{% endfor %}\
{% if add_generation_prompt %} ASSISTANT:{% endif %}"""
"""The conversation of the authors' evaluation (`llava_v1`). They trained with "curious user" in its place."""


def driving_messages(images: Sequence[Image.Image], question: str) -> list[dict[str, Any]]:
    """The conversation of one question about six views, for `apply_chat_template`.

    Args:
        images: in the order of `CAMERAS`.

    Raises:
        ValueError: there are not six pictures.
    """
    if len(images) != len(CAMERAS):
        raise ValueError(
            f"Senna takes {len(CAMERAS)} pictures, in the order {', '.join(CAMERAS)}; got {len(images)}"
        )
    content: list[dict[str, Any]] = []
    for label, image in zip(LABELS, images, strict=True):
        content += [{"type": "text", "text": f"<{label}>:\n"}, {"type": "image", "image": image}]
    return [{"role": "user", "content": [*content, {"type": "text", "text": question}]}]


class SennaProcessor(LlavaProcessor):
    """LLaVA's processor, for a model whose adapter decides how many tokens a picture has.

    Args:
        view_tokens: tokens of each picture, as `SennaConfig.image_seq_length`.
    """

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        view_tokens: int = 128,
        chat_template: str | None = None,
        **kwargs: Any,
    ):
        self.view_tokens = view_tokens
        super().__init__(
            image_processor, tokenizer, chat_template=chat_template or TEMPLATE, **kwargs
        )

    def conversation(self, images: Sequence[Image.Image], question: str) -> list[dict[str, Any]]:
        """One question about six views, or about a picture or several without names of views."""
        if len(images) == len(CAMERAS):
            return driving_messages(images, question)
        content: list[dict[str, Any]] = [{"type": "image", "image": image} for image in images]
        return [{"role": "user", "content": [*content, {"type": "text", "text": question}]}]

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs: Any) -> str:
        """What stands in the prompt for one picture."""
        tokens: str = self.image_token * self.view_tokens
        return tokens
