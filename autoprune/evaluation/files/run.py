"""Answer a file of questions, or what is left of it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import transformers

from ... import __version__
from ...files import make_folder
from ..progress import progress_bar
from ..run_directory import claim
from .asking import Asker, Asking
from .journal import Entry, Failure, Journal, write_failures
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
    folder = answers_file.with_name(answers_file.name + ".run")
    count = sum(1 for _ in asking.file)
    if not count:
        raise ValueError(f"there are no questions in {str(asking.questions)!r}")
    positions = asking.positions(count)
    if processes.rank == 0:
        _claim(asking, answers_file, folder)
    processes.wait()
    journal = Journal(folder, count)
    done = journal.answered()
    todo = _pieces(positions, done, asking.batch_size)
    mine = todo[processes.rank :: processes.count]
    if engine == "ray":
        from .ray_engine import answer_with_ray

        entries = answer_with_ray(asking, mine, workers)
    else:
        here = replace(asking, device=processes.device(asking.device))
        entries = _answer_here(here, mine, say if processes.rank == 0 else _say_nothing)
    writer = journal.writer(processes.rank)
    try:
        with progress_bar(show_progress and processes.rank == 0) as progress:
            before = len(positions) - sum(map(len, todo))
            bar = progress.add_task(
                "answering", total=before + sum(map(len, mine)), completed=before
            )
            for entry in entries:
                writer.append(entry)
                progress.advance(bar, len(entry.answers) + len(entry.failed))
    finally:
        writer.close()
    processes.wait()
    if processes.rank:
        return None
    failed = journal.failures(positions)
    write_failures(folder / "failed.jsonl", failed)
    journal.join(positions, answers_file)
    return Outcome(len(positions), failed)


def _say_nothing(text: str) -> None:
    """The first process says it for all."""


def _claim(asking: Asking, answers_file: Path, folder: Path) -> None:
    make_folder(answers_file.parent)
    if answers_file.is_dir():
        raise ValueError(f"{str(answers_file)!r} is a folder; give the name of a file in it")
    if answers_file.exists() and not folder.exists():
        raise ValueError(
            f"{str(answers_file)!r} is there, and is not of a run that can go on; delete it, or give another "
            "name"
        )
    noted = {"batch_size": asking.batch_size, "device": asking.device, "limit": asking.limit}
    claim(
        folder,
        _decides(asking),
        noted,
        "run",
        f"give another answers file, delete this folder to answer {str(answers_file)!r} anew",
    )


def _decides(asking: Asking) -> dict[str, Any]:
    """What decides the answers."""
    return {
        "questions": asking.file.digest(),
        "images": str(asking.images),
        "model": asking.model or "embedded model",
        "dtype": asking.dtype,
        "method": repr(asking.method),
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
