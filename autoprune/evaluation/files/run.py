"""Answer a file of questions, or what is left of it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, fields, is_dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import torch
import transformers

from ... import __version__
from ...files import check_folder, make_folder
from ...methods.base import Method
from ..progress import progress_bar
from ..run_directory import claim
from .asking import Asker, Asking
from .journal import Entry, Failure, Journal, Writer, write_failures
from .processes import Processes
from .questions import Forward

Engine = Literal["local", "ray"]
Piece = list[int]
"""Positions of questions that are asked together."""


@dataclass(frozen=True)
class Outcome:
    """How many questions there were, and those that have no answer."""

    questions: int
    failed: list[Failure]


def answer_file(
    asking: Asking,
    answers_file: Path,
    engine: Engine = "local",
    workers: int = 1,
    show_progress: bool = False,
    say: Callable[[str], None] = lambda text: print(text, file=sys.stderr),
) -> Outcome | None:
    """Answer the questions of a file and write the answers, in the order of the questions.

    What is answered is kept in a folder beside the answers, `<answers_file>.run`, batch by batch. The same call
    goes on from there when it was killed, and asks again what could not be answered. The answers appear whole.

    Args:
        engine: "local" answers here; started by `accelerate launch` or `torchrun`, each process takes its
            share. "ray" gives the batches to the workers of a Ray cluster.
        workers: of Ray, each with a model of its own.
        show_progress: a bar on stderr.
        say: is told what is good to know.

    Returns:
        None in processes other than the first.

    Raises:
        ValueError: bad input, see `QuestionFile` and `load_model`; answers of another run are there.
        UnsupportedError: a model that cannot be pruned.
        ImportError: Ray is asked for and not there.
    """
    processes = Processes.launched()
    run = _Run(asking, answers_file, processes)
    entries = run.entries(engine, workers, say if processes.rank == 0 else _say_nothing)
    with progress_bar(show_progress and processes.rank == 0) as progress:
        bar = progress.add_task("answering", total=run.before + run.left, completed=run.before)
        # The folder is made with the first answers: settings that do not work leave nothing behind.
        first = next(entries, Entry())
        with closing(run.begin()) as writer:
            for entry in chain([first], entries):
                writer.append(entry)
                progress.advance(bar, len(entry.answers) + len(entry.failed))
    processes.wait()
    return run.join() if processes.rank == 0 else None


class _Run:
    """A run of one process: what it has to do, and where it keeps what is done.

    Attributes:
        before: questions that are answered already. left: those that this process is to answer.
    """

    def __init__(self, asking: Asking, answers_file: Path, processes: Processes):
        self._asking, self._answers_file, self._processes = asking, answers_file, processes
        self._folder = answers_file.with_name(answers_file.name + ".run")
        count = sum(1 for _ in asking.file)
        if not count:
            raise ValueError(f"there are no questions in {str(asking.questions)!r}")
        self._positions = asking.positions(count)
        if processes.rank == 0:
            self._check()
        self._journal = Journal(self._folder, count)
        todo = _pieces(self._positions, self._journal.answered(), asking.batch_size)
        self._mine = todo[processes.rank :: processes.count]
        self.before = len(self._positions) - sum(map(len, todo))
        self.left = sum(map(len, self._mine))

    def entries(self, engine: Engine, workers: int, say: Callable[[str], None]) -> Iterator[Entry]:
        """Answers what is left."""
        if engine == "ray":
            from .ray_engine import answer_with_ray

            return answer_with_ray(self._asking, self._mine, workers)
        device = self._processes.device(self._asking.device)
        return _answer_here(replace(self._asking, device=device), self._mine, say)

    def begin(self) -> Writer:
        """Make the folder, or take up the one that is there. All processes come here."""
        self._processes.wait()
        if self._processes.rank == 0:
            make_folder(self._answers_file.parent)
            self._claim()
        self._processes.wait()
        return self._journal.writer(self._processes.rank)

    def join(self) -> Outcome:
        """Write the file of answers."""
        failed = self._journal.failures(self._positions)
        write_failures(self._folder / "failed.jsonl", failed)
        self._journal.join(self._positions, self._answers_file)
        return Outcome(len(self._positions), failed)

    def _check(self) -> None:
        """Refuse, before anything is done, what cannot be written to."""
        path = self._answers_file
        check_folder(path.parent)
        if path.is_dir():
            raise ValueError(f"{str(path)!r} is a folder; give the name of a file in it")
        if self._folder.exists():
            self._claim()
        elif path.exists():
            raise ValueError(
                f"{str(path)!r} is there, and is not of a run that can go on; delete it, or give another name"
            )

    def _claim(self) -> None:
        asking = self._asking
        noted = {"batch_size": asking.batch_size, "device": asking.device, "limit": asking.limit}
        again = f"delete this folder to answer {str(self._answers_file)!r} anew"
        otherwise = f"give another answers file, {again}"
        claim(self._folder, _decides(asking), noted, "run", otherwise)


def _say_nothing(text: str) -> None:
    """The first process says it for all."""


def _decides(asking: Asking) -> dict[str, Any]:
    """What decides the answers."""
    return {
        "questions": asking.file.digest(),
        "images": str(asking.images),
        "model": asking.model or "embedded model",
        "dtype": asking.dtype,
        "method": _settings(asking.method),
        "max_new_tokens": asking.max_new_tokens,
        "conversation": asking.conversation,
        "llava_pictures": asking.llava_pictures,
        "instruction": asking.instruction,
        "num_chunks": asking.num_chunks,
        "chunk_idx": asking.chunk_idx,
        "version": {
            "autoprune": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }


def _settings(method: Method) -> dict[str, str]:
    """A method's name and its options, the budget among them."""
    if not is_dataclass(method):
        return {"name": method.name, "options": repr(method)}
    options = {field.name: str(getattr(method, field.name)) for field in fields(method)}
    return {"name": method.name, **options}


def _pieces(positions: range, done: bytearray, batch_size: int) -> list[Piece]:
    """What is not answered yet, batch by batch. The batches do not depend on what is answered."""
    batches = [positions[at : at + batch_size] for at in range(0, len(positions), batch_size)]
    pieces = ([position for position in batch if not done[position]] for batch in batches)
    return [piece for piece in pieces if piece]


def _answer_here(
    asking: Asking, pieces: list[Piece], say: Callable[[str], None]
) -> Iterator[Entry]:
    """Answer piece after piece, while the pictures of the next one are read."""
    if not pieces:
        return
    asker, questions = Asker(asking), Forward(asking.file)
    if asker.conversation != asking.conversation:
        say(
            f"{asking.conversation} is not how this model was trained: its own chat template is used"
        )
    with ThreadPoolExecutor(1) as reader:

        def read(piece: Piece) -> Any:
            asked = questions.take(piece)
            return asked, [asker.picture(question) for question in asked]

        coming = reader.submit(read, pieces[0])
        for number in range(len(pieces)):
            asked, pictures = coming.result()
            if number + 1 < len(pieces):
                coming = reader.submit(read, pieces[number + 1])
            yield asker.answer(asked, pictures)
