"""Prompts of CogVLM: one picture in front of the text, and the templates that it was trained with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers.feature_extraction_utils import BatchFeature
from transformers.processing_utils import ProcessorMixin

IMAGE, BOI, EOI = "<image>", "<boi>", "<eoi>"

_PICTURES = """\
{% for message in messages %}{% if message['content'] is not string %}\
{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>{% endif %}{% endfor %}\
{% endif %}{% endfor %}"""
_TEXT = """\
{% macro text(message) %}{% if message['content'] is string %}{{ message['content'] }}{% else %}\
{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}\
{% endif %}{% endmacro %}"""
_TURNS = """\
{% for message in messages %}{% if message['role'] == 'user' %}Question: {{ text(message) }} ANSWER:\
{% elif message['role'] == 'assistant' %} {{ text(message) + '\\n' }}\
{% else %}{{ raise_exception('CogVLM knows no messages of the role ' + message['role']) }}{% endif %}\
{% endfor %}"""
_BARE = "{% for message in messages %}{{ text(message) }}{% endfor %}"

# For `chat_template`: conversations, short answers (as in VQAv2), and the text as it is.
TEMPLATES = {
    "chat": _PICTURES + _TEXT + _TURNS.replace("ANSWER", "Answer"),
    "vqa": _PICTURES + _TEXT + _TURNS.replace("ANSWER", "Short answer"),
    "base": _PICTURES + _TEXT + _BARE,
}


class CogVLMProcessor(ProcessorMixin):
    """Token ids and pixels of prompts: bos, then boi, the patches and eoi in the place of `<image>`, then text.

    Args:
        image_processor: resizes pictures to the tower's square.
        tokenizer: that of Vicuna-7B v1.5 with the special tokens `<image>`, `<boi>` and `<eoi>`.
        chat_template: one of `TEMPLATES`; "chat" by default.
        patch_size: pixels along the side of a patch.
    """

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        chat_template: str | None = None,
        patch_size: int = 14,
    ):
        super().__init__(
            image_processor, tokenizer, chat_template=chat_template or TEMPLATES["chat"]
        )
        self.patch_size = patch_size
        self.image_token = IMAGE
        self.image_token_id, self.boi_token_id, self.eoi_token_id = (
            _special(tokenizer, token) for token in (IMAGE, BOI, EOI)
        )

    def __call__(
        self,
        images: Any = None,
        text: str | Sequence[str] | None = None,
        padding: Any = False,
        padding_side: str = "left",
        return_tensors: str | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """`input_ids`, `attention_mask` and, with pictures, `pixel_values` [pictures, 3, height, width].

        Args:
            images: the pictures in the order of the prompts, flat or one list for each prompt.
            text: a prompt or several; `<image>` stands where its picture is.
            padding, padding_side, return_tensors: as of a tokenizer.

        Raises:
            ValueError: no text; a prompt with several pictures; more or fewer pictures than places.
        """
        if text is None:
            raise ValueError("CogVLMProcessor needs text, which may be empty: text=''")
        texts = [text] if isinstance(text, str) else list(text)
        pictures = _flat(images)
        _check(texts, len(pictures))
        shown: dict[str, Any] = {}
        patches = 0
        if pictures:
            shown = dict(self.image_processor(pictures, return_tensors="pt"))
            height, width = shown["pixel_values"].shape[-2:]
            patches = (height // self.patch_size) * (width // self.patch_size)
        ids = {"input_ids": [self._ids(prompt, patches) for prompt in texts]}
        padded = self.tokenizer.pad(
            ids, padding=padding, padding_side=padding_side, return_tensors=return_tensors
        )
        return BatchFeature({**padded, **shown})

    def _ids(self, prompt: str, patches: int) -> list[int]:
        """Text before and behind a picture is cut into tokens by itself, as in the original."""
        ids = [self.tokenizer.bos_token_id]
        for number, piece in enumerate(prompt.split(IMAGE)):
            if number:
                ids += [self.boi_token_id, *[self.image_token_id] * patches, self.eoi_token_id]
            if piece:
                ids += self.tokenizer(piece, add_special_tokens=False)["input_ids"]
        return ids

    @property
    def model_input_names(self) -> list[str]:
        return ["input_ids", "attention_mask", "pixel_values"]


def add_tokens(tokenizer: Any) -> None:
    """Give a tokenizer the three special tokens of pictures, behind those it has."""
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE, BOI, EOI]})


def _special(tokenizer: Any, token: str) -> int:
    number = tokenizer.get_vocab().get(token)
    if number is None:
        raise ValueError(
            f"the tokenizer has no token {token!r}; take that of a converted checkpoint, or call "
            "autoprune.models.cogvlm.processing.add_tokens(tokenizer)"
        )
    return number


def _flat(images: Any) -> list[Any]:
    if images is None:
        return []
    if not isinstance(images, list | tuple):
        return [images]
    return [picture for entry in images for picture in _flat(entry)]


def _check(texts: Sequence[str], pictures: int) -> None:
    places = [text.count(IMAGE) for text in texts]
    if max(places, default=0) > 1:
        raise ValueError(
            f"CogVLM takes one picture in a prompt, but one has {max(places)}; ask about each by itself"
        )
    if sum(places) != pictures:
        raise ValueError(
            f"{pictures} pictures came with prompts that have {sum(places)} places for one ({IMAGE}); write "
            f"{IMAGE} where a prompt has its picture"
        )
