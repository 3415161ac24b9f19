"""FOLDER: similar visual tokens are folded together, before the decoder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..method import Tower
from .tome import ToMe


@dataclass(frozen=True)
class Folder(ToMe):
    """Folds similar visual tokens together, half of them at a time, before the decoder.

    As `tome`, but all that is to go leaves in one round, or in as few as there can be: each takes up
    to half of the tokens that are left, until the budget is met.
    Differs from the official code: as `tome` does when it merges at the tower's end, which is where
    this method folds; and merged tokens are not scaled by 1 + log(size), as its simplified version does.

    Args:
        budget: a `Budget`, or the mean number of visual tokens entering a layer.
        rounds: as for `tome`; 1 folds.
    """

    name: ClassVar[str] = "folder"
    paper: ClassVar[str] = (
        "FOLDER: Accelerating Multi-modal Large Language Models with Enhanced Performance, ICCV 2025, "
        "arxiv.org/abs/2501.02430"
    )

    sees: ClassVar[Tower] = Tower(attention=True, keys=True)

    rounds: int = 1
