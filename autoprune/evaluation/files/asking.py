"""A model that is asked the questions of a file."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from ...errors import UnsupportedError
from ...loading import load_embedded, load_model
from ...methods.base import Method
from ...trace import Sample
from ..answering import generate
from ..prompts import can_pad, encode_texts
from .journal import Entry, Failure
from .prompts import TEMPLATE, fitting, padding_colour, picture, prompt
from .questions import Question, QuestionFile

Picture = Image.Image | None | ValueError
"""A picture, none, or why it cannot be had."""
_ID_LENGTH = 22


@dataclass(frozen=True)
class Asking:
    """What is asked, of which model and how: all that a process needs to answer a part of it.

    Args:
        questions: the file, see `QuestionFile`. images: the folder of its pictures.
        method: prunes, under its budget.
        model: folder or hub name; None is the embedded model.
        device, dtype: see `load_model`.
        max_new_tokens: length of an answer at most.
        conversation: words around a question, one of `CONVERSATIONS`. LLaVA's are used for models whose own
            chat template is alike; all others get their own.
        llava_pictures: read pictures as LLaVA's scripts do: converted by Pillow alone, and padded to a square
            for models of one square picture.
        instruction: see `QuestionFile`.
        batch_size: questions at a time.
        num_chunks, chunk_idx: answer this one of so many parts of the file, cut as LLaVA's scripts cut it.
        limit: the first questions only.
    """

    questions: Path
    images: Path
    method: Method
    model: str | None = None
    device: str = "auto"
    dtype: str = "auto"
    max_new_tokens: int = 128
    conversation: str = TEMPLATE
    llava_pictures: bool = False
    instruction: str = ""
    batch_size: int = 8
    num_chunks: int = 1
    chunk_idx: int = 0
    limit: int | None = None

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "batch_size", "num_chunks"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit must be at least 1, got {self.limit}")
        if not 0 <= self.chunk_idx < self.num_chunks:
            raise ValueError(
                f"chunk_idx counts from 0 to num_chunks - 1, which is {self.num_chunks - 1}; got "
                f"{self.chunk_idx}"
            )

    @property
    def file(self) -> QuestionFile:
        """The questions."""
        return QuestionFile(self.questions, self.images, self.instruction)

    @property
    def model_id(self) -> str:
        """What answers call the model: the last part of its path, as LLaVA's scripts have it."""
        if self.model is None:
            return "embedded"
        parts = self.model.strip("/").split("/")
        return "_".join(parts[-2:]) if parts[-1].startswith("checkpoint-") else parts[-1]

    def positions(self, count: int) -> range:
        """Positions of its chunk in a file of so many questions, up to the limit."""
        size = math.ceil(count / self.num_chunks)
        start = min(size * self.chunk_idx, count)
        stop = min(start + size, count)
        return range(start, stop if self.limit is None else min(stop, start + self.limit))


class Asker:
    """The model, ready to be asked.

    Attributes:
        conversation: the one that is used.

    Raises:
        ValueError, UnsupportedError: as `load_model`, or the method cannot prune this model.
    """

    def __init__(self, asking: Asking):
        where = (asking.device, asking.dtype)
        loaded = load_embedded(*where) if asking.model is None else load_model(asking.model, *where)
        asking.method(loaded.model)
        self._asking = asking
        self._model, self._processor = loaded.model, loaded.processor
        self.conversation = fitting(asking.conversation, loaded.processor)
        self._squared = None
        if asking.llava_pictures:
            self._squared = padding_colour(loaded.model, loaded.processor)

    def picture(self, question: Question) -> Picture:
        """The picture of a question; may be called from another thread."""
        if question.problem:
            return None
        try:
            return picture(question, self._squared, self._asking.llava_pictures)
        except ValueError as error:
            return error

    def answer(self, questions: Sequence[Question], pictures: Sequence[Picture]) -> Entry:
        """Ask the questions together. One that cannot be answered leaves the others as they are.

        Raises:
            ValueError: the device has too little memory.
        """
        entry = Entry()
        groups: dict[bool, list[tuple[Question, Image.Image | None]]] = {True: [], False: []}
        for question, image in zip(questions, pictures, strict=True):
            if question.problem or isinstance(image, ValueError):
                reason = question.problem or str(image)
                entry.failed.append(Failure(question.position, question.id, reason))
            else:
                groups[image is not None].append((question, image))
        try:
            for group in groups.values():
                together = len(group) if can_pad(self._processor) else 1
                for start in range(0, len(group), together or 1):
                    entry += self._ask(group[start : start + together])
        except torch.OutOfMemoryError as error:
            raise ValueError(
                f"{len(questions)} questions at a time are too many for the memory of the device; the same "
                "command with a smaller batch size goes on from here"
            ) from error
        return Entry(sorted(entry.answers, key=lambda answer: answer[0]), entry.failed)

    def _ask(self, group: Sequence[tuple[Question, Image.Image | None]]) -> Entry:
        """Ask questions that all have a picture, or all have none."""
        try:
            inputs = self._inputs(group)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # processors raise anything at odd pictures and texts
            return self._one_by_one(group, error)
        try:
            texts, samples = generate(
                self._model,
                self._processor,
                self._asking.method,
                inputs,
                self._asking.max_new_tokens,
            )
        except (ValueError, UnsupportedError) as error:
            return self._one_by_one(group, error)
        return Entry(
            [
                (question.position, self._record(question, text.strip(), sample))
                for (question, _), text, sample in zip(group, texts, samples, strict=True)
            ]
        )

    def _one_by_one(
        self, group: Sequence[tuple[Question, Image.Image | None]], error: Exception
    ) -> Entry:
        """Find out which of them it was that went wrong."""
        if len(group) == 1:
            question = group[0][0]
            reason = " ".join(str(error).split()) or type(error).__name__
            return Entry(failed=[Failure(question.position, question.id, reason)])
        return sum((self._ask([one]) for one in group), Entry())

    def _inputs(self, group: Sequence[tuple[Question, Image.Image | None]]) -> Any:
        texts = [
            prompt(self._processor, self.conversation, question.text, image is not None)
            for question, image in group
        ]
        images = [[image] for _, image in group if image is not None]
        inputs = encode_texts(self._processor, texts, images or None)
        return inputs.to(self._model.device).to(self._model.dtype)

    def _record(self, question: Question, text: str, sample: Sample) -> dict[str, Any]:
        """The answer as LLaVA's scripts write it; theirs have nothing in `metadata`."""
        name = self._asking.model_id
        unique = f"{question.position}\n{question.id}\n{name}"
        return {
            "question_id": question.id,
            "prompt": question.prompt,
            "text": text,
            "answer_id": hashlib.sha256(unique.encode()).hexdigest()[:_ID_LENGTH],
            "model_id": name,
            "metadata": {
                "method": self._asking.method.name,
                "budget": str(self._asking.method.budget),
                "visual_tokens": sample.num_visual,
                "mean_tokens": sample.mean_tokens,
                "flops": sample.total_flops,
            },
            **question.fields,
        }
