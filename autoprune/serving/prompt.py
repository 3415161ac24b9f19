"""A conversation as the model's inputs: chat template, tokenizer, image processor."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from PIL import Image

from ..loading import Loaded
from .errors import RequestError
from .messages import Message

_ANY_TEXT = "a"


@dataclass(frozen=True)
class Prompt:
    """One prompt, ready for the model.

    inputs: tensors of a batch of one, on the CPU.
    num_visual, num_text: its tokens.
    """

    inputs: dict[str, torch.Tensor]
    num_visual: int
    num_text: int

    @property
    def length(self) -> int:
        return self.num_visual + self.num_text


class Prompts:
    """Makes prompts for one model.

    Args:
        visual_ids: token ids that stand for pictures.
    """

    def __init__(self, loaded: Loaded, visual_ids: Sequence[int]) -> None:
        self._processor = loaded.processor
        self._tokenizer = getattr(loaded.processor, "tokenizer", loaded.processor)
        self._visual_ids = torch.tensor(visual_ids)
        self._special = _special_tokens(loaded.processor, self._tokenizer)
        self.room = _room(loaded.model, self._tokenizer)

    def make(
        self, messages: Sequence[Message], pictures: Sequence[Image.Image], max_tokens: int
    ) -> Prompt:
        """The prompt of a conversation.

        Args:
            pictures: in the order in which they stand in the messages.
            max_tokens: new tokens, for which there must be room behind the prompt.

        Raises:
            RequestError: the template refuses the messages, a text holds special tokens, the model cannot take
                the pictures, or the prompt is too long.
        """
        text = self._written(messages)
        self._refuse_special_tokens(messages, text)
        inputs = self._encoded(text, pictures)
        ids = inputs["input_ids"]
        visual = int(torch.isin(ids, self._visual_ids).sum())
        prompt = Prompt(inputs, visual, ids.shape[1] - visual)
        if self.room is not None and prompt.length + max_tokens > self.room:
            raise RequestError(
                f"the prompt has {prompt.length} tokens ({visual} of them visual) and max_tokens is "
                f"{max_tokens}, but the model has room for {self.room}; shorten one of them",
                param="messages",
                code="context_length_exceeded",
            )
        return prompt

    def _written(self, messages: Sequence[Message]) -> str:
        """The conversation by the model's chat template, up to where it answers."""
        if not getattr(self._processor, "chat_template", None):
            return self._without_template(messages)
        try:
            written = self._processor.apply_chat_template(
                [_as_dict(message) for message in messages],
                add_generation_prompt=True,
                tokenize=False,
            )
        except Exception as error:  # a template raises what it likes
            raise RequestError(
                f"the model's chat template refuses these messages: {_line(error)}",
                param="messages",
            ) from error
        return str(written)

    def _without_template(self, messages: Sequence[Message]) -> str:
        if len(messages) > 1:
            raise RequestError(
                "this model has no chat template, so it takes a single message", param="messages"
            )
        image = getattr(self._processor, "image_token", "<image>")
        parts = messages[0].parts
        pictures = "".join(f"{image}\n" for part in parts if part.picture is not None)
        return pictures + "\n".join(part.text for part in parts if part.text is not None)

    def _refuse_special_tokens(self, messages: Sequence[Message], written: str) -> None:
        """A text must not end a turn, begin another one, or stand for a picture."""
        for message in messages:
            for part in message.parts:
                for token in self._special.values():
                    if token in (part.text or ""):
                        raise RequestError(
                            f"{part.path} holds {token!r}, a special token of this model; leave it out",
                            param=part.path,
                        )
        # Texts that are put together may make what none of them holds.
        harmless = self._written([_with_text(message, _ANY_TEXT) for message in messages])
        if self._special_in(written) != self._special_in(harmless):
            raise RequestError(
                "the texts of the messages make special tokens of this model where they are put together; "
                "change them",
                param="messages",
            )

    def _special_in(self, text: str) -> Counter[int]:
        ids = self._tokenizer(text, add_special_tokens=False).input_ids
        return Counter(token for token in ids if token in self._special)

    def _encoded(self, text: str, pictures: Sequence[Image.Image]) -> dict[str, torch.Tensor]:
        options: dict[str, Any] = {}
        start = getattr(self._tokenizer, "bos_token", None)
        if start and text.startswith(start):
            # The template has written it already.
            options["add_special_tokens"] = False
        if pictures:
            options["images"] = [list(pictures)]
        try:
            encoded = self._processor(text=[text], return_tensors="pt", **options)
        except Exception as error:  # each processor raises its own kind
            raise RequestError(
                f"the model's processor cannot take this prompt: {_line(error)}", param="messages"
            ) from error
        return {name: value for name, value in encoded.items() if torch.is_tensor(value)}


def _as_dict(message: Message) -> dict[str, Any]:
    """A message as chat templates take it."""
    content = [
        {"type": "text", "text": part.text} if part.picture is None else {"type": "image"}
        for part in message.parts
    ]
    return {"role": message.role, "content": content}


def _with_text(message: Message, text: str) -> Message:
    """The message with every text replaced."""
    parts = (part if part.text is None else replace(part, text=text) for part in message.parts)
    return replace(message, parts=tuple(parts))


def _special_tokens(processor: Any, tokenizer: Any) -> dict[int, str]:
    """Tokens with a meaning beyond text, by id."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    tokens = {index: str(token) for index, token in added.items() if token.special}
    names = [*getattr(tokenizer, "all_special_tokens", [])]
    names += [getattr(processor, name, None) for name in ("image_token", "video_token")]
    for name in names:
        if isinstance(name, str) and name:
            tokens[int(tokenizer.convert_tokens_to_ids(name))] = name
    unknown = getattr(tokenizer, "unk_token_id", None)
    return {index: token for index, token in tokens.items() if index != unknown and token.strip()}


def _room(model: Any, tokenizer: Any) -> int | None:
    """Positions that the model was made for; None if nothing says so."""
    text = model.config.get_text_config()
    sizes = [getattr(text, "max_position_embeddings", None)]
    sizes.append(getattr(tokenizer, "model_max_length", None))
    known = [size for size in sizes if isinstance(size, int) and 0 < size < 10**9]
    return min(known, default=None)


def _line(error: Exception) -> str:
    """The first line of an error, shortened."""
    return str(error).strip().partition("\n")[0][:200] or type(error).__name__
