"""Processes that draw scenes while the model learns from those drawn before."""

from __future__ import annotations

import multiprocessing
import queue
import random
import time
from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray
from packed import Packer, choose
from questions import EXTRA, KINDS, ask, heldout_questions
from scenes import draw_scene, patch_labels

Arrays = tuple[NDArray, ...]
# How often each kind is asked for. A picture has one word and one sum, so asking twice gives it once.
WEIGHTS = {
    "colour": 1.5,
    "presence": 1.5,
    "word": 1.5,
    "digit": 1.5,
    "count": 4.0,
    "relation": 3.0,
    "sum": 1.5,
    "neighbour": 3.0,
    "place": 1.5,
}


class Clock:
    """Which share of a stage's time is over; shared with the processes that draw."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._start = multiprocessing.get_context("fork").Value("d", 0.0)

    def start(self, elapsed: float = 0.0) -> None:
        """Begin, as if `elapsed` seconds were over already."""
        self._start.value = time.time() - elapsed

    @property
    def elapsed(self) -> float:
        """Seconds since the start; 0 before it."""
        return time.time() - self._start.value if self._start.value else 0.0

    @property
    def progress(self) -> float:
        """From 0 to 1."""
        return min(self.elapsed / self.seconds, 1.0)


def tower_batch(first_seed: int, pictures: int) -> Arrays:
    """Pictures, uint8 [pictures, 96, 96, 3], and labels of patches, uint8 [pictures, 12, 12, 4]."""
    scenes = [draw_scene(first_seed + index, "train") for index in range(pictures)]
    labels = [patch_labels(scene) for scene in scenes]
    return np.stack([scene.pixels for scene in scenes]), np.stack(labels).astype(np.uint8)


def packed_batch(first_seed: int, pictures: int, packer: Packer, progress: float) -> Arrays:
    """Pictures and rows of questions about them, int64 [pictures, 4, length].

    At first the questions are what is in which cell; then the others take their place.
    """
    rng = random.Random(first_seed)
    others = min(max((progress - 0.12) / 0.25, 0.0), 0.93)
    weights = [WEIGHTS.get(kind, 0.0) * others / 20 for kind in KINDS]
    weights[KINDS.index("cell")] = 1 - others
    pixels, rows = [], []
    for index in range(pictures):
        scene = draw_scene(first_seed + index, "train")
        found = choose(lambda kind, scene=scene: ask(scene, kind, rng), KINDS, weights, rng, 36)
        if rng.random() < max(0.6 * (1 - others), 0.1):
            found.insert(0, ask(scene, "list", rng))
        pixels.append(scene.pixels)
        rows.append(packer.pack(found))
    return np.stack(pixels), np.stack(rows)


def heldout_batch(per_kind: int, packer: Packer) -> tuple[list[str], NDArray, NDArray]:
    """Kinds, pictures and rows of one question each."""
    chosen = heldout_questions(per_kind, (*KINDS[: -len(EXTRA)], "cell"))
    rows = [packer.pack([question]) for _, question in chosen]
    kinds = [question.kind for _, question in chosen]
    return kinds, np.stack([scene.pixels for scene, _ in chosen]), np.stack(rows)


class Drawing:
    """Batches drawn by other processes, in any order; a process that dies only slows it down."""

    def __init__(self, draw: Callable[[int], Arrays], pictures: int, processes: int) -> None:
        context = multiprocessing.get_context("fork")
        self._ready = context.Queue(maxsize=4 * processes)
        self._processes = [
            context.Process(
                target=_draw_on, args=(self._ready, draw, pictures, worker), daemon=True
            )
            for worker in range(processes)
        ]
        for process in self._processes:
            process.start()

    def waiting(self) -> Iterator[Arrays]:
        """The batches that are ready now."""
        while True:
            try:
                yield self._ready.get_nowait()
            except queue.Empty:
                return

    def next(self) -> Arrays:
        """The next batch.

        Raises:
            RuntimeError: none came in two minutes.
        """
        try:
            return self._ready.get(timeout=120)
        except queue.Empty:
            alive = sum(process.is_alive() for process in self._processes)
            raise RuntimeError(f"no batch in two minutes; {alive} processes are alive") from None

    def stop(self) -> None:
        """End the processes."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()


def _draw_on(ready, draw: Callable[[int], Arrays], pictures: int, worker: int) -> None:
    import torch

    torch.set_num_threads(1)
    # A hundred million scenes for each process.
    seed = worker * 100_000_000
    while True:
        ready.put(draw(seed))
        seed += pictures
