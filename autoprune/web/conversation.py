"""Several questions about one picture, on the cache that was pruned for the first of them."""

from __future__ import annotations

import time
import weakref
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image

from ..engine.cache.argument import as_argument, cache_of
from ..loading import Loaded
from ..methods.base import Method
from ..trace import Sample
from .asking import MAX_NEW_TOKENS, check_question

MAX_TURNS = 20
MOST_CACHES = 8


@dataclass(frozen=True)
class Turn:
    """One answer.

    seconds: from the prepared inputs to its end. on_cache: whether the picture was not read again.
    """

    question: str
    answer: str
    seconds: float
    on_cache: bool


@dataclass(eq=False)
class Conversation:
    """A conversation about `image`, pruned by `method`.

    A later question goes on with the cache of the answer before it, where the model's template writes it
    behind what the cache holds. Else the whole conversation is read and pruned anew.

    Attributes:
        turns: what was said, the first one first.
        sample: what the last prompt that was pruned cost; None before the first question.
    """

    image: Image.Image
    method: Method
    turns: list[Turn] = field(default_factory=list)
    sample: Sample | None = None
    _ids: torch.Tensor | None = None
    _cache: Any = None

    def ask(self, loaded: Loaded, question: str) -> Turn:
        """The answer to a further question.

        Raises:
            ValueError: no question, one that is too long, one too many, or a budget that cannot be kept.
            UnsupportedError: a method that cannot prune this model.
        """
        check_question(question)
        if len(self.turns) == MAX_TURNS:
            raise ValueError(f"a conversation takes {MAX_TURNS} questions at most; begin a new one")
        inputs = self._inputs(loaded, question)
        on_cache = self._goes_on(loaded, inputs["input_ids"][0])
        if on_cache:
            # The cache has the picture.
            inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")}
            inputs |= as_argument(loaded.model, self._cache)
        # Half an answer may be left in it where one fails.
        self.forget()
        start = time.perf_counter()
        with self.method(loaded.model) as trace, torch.inference_mode():
            output = loaded.model.generate(
                **inputs,
                max_new_tokens=MAX_NEW_TOKENS,
                do_sample=False,
                num_beams=1,
                return_dict_in_generate=True,
            )
        seconds = time.perf_counter() - start
        ids = output.sequences
        if not on_cache:
            self.sample = trace.samples[0]
        # The last token was not put into the cache.
        self._ids, self._cache = ids[0, :-1].cpu(), cache_of(output)
        new = ids[:, inputs["input_ids"].shape[1] :]
        text = str(loaded.processor.batch_decode(new, skip_special_tokens=True)[0]).strip()
        turn = Turn(question, text, seconds, on_cache)
        self.turns.append(turn)
        return turn

    def forget(self) -> None:
        """Give the cache up; the next question reads all anew."""
        self._ids = self._cache = None

    def _inputs(self, loaded: Loaded, question: str) -> dict[str, Any]:
        """The whole conversation with its picture, as the model takes it."""
        processor = loaded.processor
        if not getattr(processor, "chat_template", None):
            if self.turns:
                raise ValueError(
                    f"{loaded.name} has no chat template, so it takes one question; begin a new conversation"
                )
            text = f"{getattr(processor, 'image_token', '<image>')}\n{question}"
            inputs = processor(images=[self.image], text=[text], return_tensors="pt")
        else:
            inputs = processor.apply_chat_template(
                self._messages(question),
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
            )
        return dict(inputs.to(loaded.model.device).to(loaded.model.dtype))

    def _messages(self, question: str) -> list[dict[str, Any]]:
        messages = []
        for turn in self.turns:
            messages += [("user", turn.question), ("assistant", turn.answer)]
        messages.append(("user", question))
        written: list[dict[str, Any]] = [
            {"role": role, "content": [{"type": "text", "text": text}]} for role, text in messages
        ]
        written[0]["content"].insert(0, {"type": "image", "image": self.image})
        return written

    def _goes_on(self, loaded: Loaded, ids: torch.Tensor) -> bool:
        """Whether the prompt begins with what the cache holds."""
        if self._ids is None or _keeps_positions(loaded.model):
            return False
        known = len(self._ids)
        return len(ids) > known and torch.equal(ids[:known].cpu(), self._ids)


def keep_recent(recent: list[weakref.ref[Conversation]], talk: Conversation) -> None:
    """Let no more than `MOST_CACHES` conversations have a cache: those of the latest questions.

    Args:
        recent: of these, the oldest first; it is brought up to date.
        talk: the one that was just asked.
    """
    others = [one for one in recent if one() not in (None, talk)]
    recent[:] = [*others, weakref.ref(talk)]
    while len(recent) > MOST_CACHES:
        oldest = recent.pop(0)()
        if oldest is not None:
            oldest.forget()


def _keeps_positions(model: Any) -> bool:
    """Whether a model has the positions of its last prompt on itself, which may be that of another user."""
    return any(hasattr(module, "rope_deltas") for module in model.modules())
