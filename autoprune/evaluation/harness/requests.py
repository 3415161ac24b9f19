"""What the harness asks for, and what of it is answered together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from .generation import same_generation


@dataclass(frozen=True)
class Asked:
    """One request.

    messages: makes the messages of the task's document; called with the number of a round, too.
    options: of generation, as the task has them. answer: the one whose likelihood is asked for.
    """

    task: str
    split: str
    doc_id: int
    context: str
    messages: Callable[..., Any]
    options: Mapping[str, Any]
    metadata: Mapping[str, Any]
    answer: str = ""

    @property
    def is_padding(self) -> bool:
        """Whether it is a repetition that fills up the share of a process."""
        return bool((self.metadata or {}).get("__padding_only__"))


def in_batches(asked: Sequence[Asked], size: int) -> Iterator[list[int]]:
    """Numbers of requests that are answered together: of one generation, the longest texts first."""

    def generation(i: int) -> str:
        return same_generation(asked[i].options)

    order = sorted(range(len(asked)), key=lambda i: (generation(i), -len(asked[i].context)))
    for _, group in groupby(order, key=generation):
        alike = list(group)
        for start in range(0, len(alike), size):
            yield alike[start : start + size]
