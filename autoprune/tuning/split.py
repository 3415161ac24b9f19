"""Prompts to tune on and prompts to judge on: no picture is in both."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from ..evaluation.statistics import FEWEST
from ..evaluation.tasks import Task, picture_digest

PARTS = 4
"""A trial is asked one part, then one more, then the rest: it may stop before each."""
ENOUGH = 200
"""Prompts below which a search follows chance more than the model."""


@dataclass(frozen=True)
class Split:
    """The prompts of a search.

    tuning: in `PARTS` parts of about the same size. held_out: what is judged on.
    pictures: of each held-out prompt, a number that tells its picture from others.
    """

    tuning: tuple[tuple[Task, ...], ...]
    held_out: tuple[Task, ...]
    pictures: tuple[int, ...]

    @property
    def tuned_on(self) -> int:
        """How many prompts are tuned on."""
        return sum(map(len, self.tuning))


def split(prompts: Sequence[Task], seed: int) -> Split:
    """Half of the prompts to tune on, half to judge on, drawn by picture.

    Raises:
        ValueError: there are fewer pictures than two halves need to show more than chance.
    """
    pictures: dict[str, list[Task]] = {}
    for prompt in prompts:
        pictures.setdefault(picture_digest(prompt), []).append(prompt)
    if len(pictures) < 2 * FEWEST:
        raise ValueError(
            f"tuning needs prompts about {2 * FEWEST} pictures or more, {FEWEST} to tune on and {FEWEST} to "
            f"judge on, and {ENOUGH} prompts or more to be of use; got {len(prompts)} about {len(pictures)}"
        )
    rng = random.Random(seed)
    groups = [pictures[name] for name in sorted(pictures)]
    rng.shuffle(groups)
    half = _half(groups)
    tuning = [prompt for group in groups[:half] for prompt in group]
    rng.shuffle(tuning)
    held_out = [(number, p) for number, group in enumerate(groups[half:]) for p in group]
    return Split(
        tuple(tuple(tuning[part::PARTS]) for part in range(PARTS)),
        tuple(prompt for _, prompt in held_out),
        tuple(number for number, _ in held_out),
    )


def _half(groups: Sequence[Sequence[Task]]) -> int:
    """How many groups, `FEWEST` or more on either side, come closest to half of the prompts."""
    total = sum(map(len, groups))

    def off(count: int) -> int:
        return abs(2 * sum(map(len, groups[:count])) - total)

    return min(range(FEWEST, len(groups) - FEWEST + 1), key=off)
