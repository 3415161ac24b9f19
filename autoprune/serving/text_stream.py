"""Tokens of an answer as text that can be sent while it grows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_INCOMPLETE = "�"


class TextStream:
    """The text of one answer. A character is sent when all its bytes are there, and a text that may begin a
    stop string when it is known that it does not.

    Attributes:
        stopped: whether a stop string has come; it is no part of the answer.
    """

    def __init__(self, tokenizer: Any, stops: Sequence[str]) -> None:
        self._tokenizer, self._stops = tokenizer, stops
        self._ids: list[int] = []
        # Decoding starts at `_start`; the text up to `_read` was handed on.
        self._start = self._read = 0
        self._held = ""
        self._begun = self.stopped = False

    def push(self, token: int) -> str:
        """The text that a further token sets free."""
        self._ids.append(token)
        text = self._new_text()
        if text.endswith(_INCOMPLETE):
            return ""
        return self._advance(text)

    def finish(self) -> str:
        """What was held back, when no further token comes."""
        freed = self._advance(self._new_text()) + self._held
        self._held = ""
        return freed

    def _new_text(self) -> str:
        """The text behind what was handed on."""
        known = self._decoded(self._ids[self._start : self._read])
        return self._decoded(self._ids[self._start :])[len(known) :]

    def _decoded(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True)) if ids else ""

    def _advance(self, text: str) -> str:
        if not text or self.stopped:
            return ""
        # A token's text depends on the one before it, in many vocabularies on no more.
        self._start, self._read = self._read, len(self._ids)
        if not self._begun:
            text = text.lstrip()
            self._begun = bool(text)
        self._held += text
        found = [at for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if found:
            self.stopped = True
            end = min(found)
        else:
            end = len(self._held) - self._may_begin_a_stop()
        freed, self._held = self._held[:end], "" if found else self._held[end:]
        return freed

    def _may_begin_a_stop(self) -> int:
        """How many of the last characters begin a stop string."""
        return max(
            (
                size
                for stop in self._stops
                for size in range(1, min(len(stop), len(self._held) + 1))
                if self._held.endswith(stop[:size])
            ),
            default=0,
        )
