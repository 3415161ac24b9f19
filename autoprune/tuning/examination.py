"""Prompts with the plain model's answers to them, computed once; what methods score on them is kept as well."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import UnsupportedError
from ..evaluation.answering import Refused
from ..evaluation.batches import Batch, prepare
from ..evaluation.encoding import Encode
from ..evaluation.tasks import Task
from ..evaluation.workers import run_all
from ..files import write_whole
from ..methods.autoprune import AutoPrune
from ..methods.base import Method
from ..policy.rules import Signals
from .agreement import Answers, Scores, plain_answers, scores
from .signals import signals

Advance = Callable[[int], None]


def ignore(prompts: int) -> None:
    """No progress to show."""


@dataclass(frozen=True)
class Examination:
    """Some prompts that methods are judged by.

    Args:
        name: of its files in the folder.
        batches, answers: the prompts as inputs, and what the plain model says to each batch.
        order: int [prompts], where each prompt of the batches stands among those that were given.
        workers: processes that share the batches.
    """

    name: str
    model: Any
    batches: Sequence[Batch]
    answers: Sequence[Answers]
    order: NDArray[np.int64]
    folder: Path
    workers: int = 1

    @classmethod
    def prepare(
        cls,
        name: str,
        loaded: tuple[Any, Any],
        tasks: Sequence[Task],
        folder: Path,
        batch_size: int,
        new_tokens: int,
        workers: int = 1,
        encode: Encode | None = None,
        by_length: bool = True,
        advance: Advance = ignore,
    ) -> Examination:
        """Make the inputs, and read the plain answers from the folder or ask for them.

        Args:
            loaded: the model and its processor.
            new_tokens: of an answer at most.
            encode, by_length: as for `evaluation.batches.prepare`.
            advance: called with the number of prompts that are ready.
        """
        model, processor = loaded
        # Batches of one size keep all workers busy.
        size = -(-len(tasks) // -(-len(tasks) // batch_size))
        batches = prepare(model, processor, tasks, size, encode=encode, by_length=by_length)
        answers = _plain(model, batches, folder / f"{name}.npz", new_tokens, workers, advance)
        place = {task.id: index for index, task in enumerate(tasks)}
        order = np.array([place[task.id] for batch in batches for task in batch.tasks])
        return cls(name, model, batches, answers, order, folder, workers)

    def scores(self, method: Method, advance: Advance = ignore) -> Scores:
        """What a method scores, in the order of the prompts that were given; kept in the folder.

        Raises:
            Refused: the method cannot run on this model, or its budget is infeasible for a prompt.
        """
        kept = self.folder / "scores" / f"{self.name}-{_digest(method)}.json"
        if kept.exists():
            columns = json.loads(kept.read_text(encoding="utf-8"))
            advance(len(self.order))
            return Scores(**{name: np.array(own, float) for name, own in columns.items()})

        def work(index: int) -> Iterator[tuple[int, Scores]]:
            yield index, scores(self.model, method, self.batches[index], self.answers[index])

        found: dict[int, Scores] = {}

        def take(news: tuple[int, Scores]) -> None:
            found[news[0]] = news[1]
            advance(len(news[1].agreement))

        try:
            run_all(work, range(len(self.batches)), min(self.workers, len(self.batches)), take)
        except (ValueError, UnsupportedError) as error:
            raise Refused(str(error)) from error
        joined = Scores.join([found[index] for index in sorted(found)])
        back = np.argsort(self.order)
        sorted_back = Scores(**{name: own[back] for name, own in vars(joined).items()})
        kept.parent.mkdir(exist_ok=True)
        write_whole(kept, json.dumps({k: v.tolist() for k, v in vars(sorted_back).items()}))
        return sorted_back

    @property
    def places(self) -> NDArray[np.int64]:
        """Where each prompt stands in its batch, in the order of the prompts that were given."""
        inside = np.concatenate([np.arange(len(batch.tasks)) for batch in self.batches])
        places: NDArray[np.int64] = inside[np.argsort(self.order)]
        return places

    def signals(self, method: AutoPrune) -> list[Signals]:
        """What a shared budget is told of each prompt, in the order of the prompts that were given."""

        def work(index: int) -> Iterator[tuple[int, list[Signals]]]:
            yield index, signals(self.model, method, self.batches[index])

        found: dict[int, list[Signals]] = {}
        workers = min(self.workers, len(self.batches))
        run_all(work, range(len(self.batches)), workers, lambda news: found.update([news]))
        joined = [own for index in sorted(found) for own in found[index]]
        return [joined[place] for place in np.argsort(self.order)]


def _digest(method: Method) -> str:
    return hashlib.sha256(repr(method).encode()).hexdigest()[:16]


def _plain(
    model: Any,
    batches: Sequence[Batch],
    path: Path,
    new_tokens: int,
    workers: int,
    advance: Advance,
) -> list[Answers]:
    if not path.exists():
        found: dict[int, Answers] = {}

        def work(index: int) -> Iterator[tuple[int, dict[str, NDArray[Any]]]]:
            # Arrays: tensors would go to another process as open files, and those are few.
            yield index, plain_answers(model, batches[index], new_tokens).arrays()

        def take(news: tuple[int, dict[str, NDArray[Any]]]) -> None:
            found[news[0]] = Answers.of_arrays(news[1])
            advance(len(news[1]["lengths"]))

        run_all(work, range(len(batches)), min(workers, len(batches)), take)
        named = {f"{i} {name}": a for i in sorted(found) for name, a in found[i].arrays().items()}
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **named)  # type: ignore[arg-type]
        write_whole(path, buffer.getvalue())
        return [found[index] for index in range(len(batches))]
    advance(sum(len(batch.tasks) for batch in batches))
    with np.load(path) as file:
        return [
            Answers.of_arrays({name: file[f"{i} {name}"] for name in Answers.__dataclass_fields__})
            for i in range(len(batches))
        ]
