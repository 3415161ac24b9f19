"""FOLDER: similar visual tokens are folded together, before the decoder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..contract import Tower
from .turbo import Turbo


@dataclass(frozen=True)
class Folder(Turbo):
    """Folds similar and little attended visual tokens together, half at a time, before the decoder.

    As `turbo`, with similarity less alpha times CLS attention, but all that is to go leaves in one round,
    or in as few as there can be: each takes up to half of the tokens that are left, until the budget is
    met. The most attended tokens stay as long as less than half of the tokens leave; a budget of less
    than half folds nearly every second token, whatever it is attended.
    Differs from the official code: as `turbo` does when it merges at the tower's end, which is where this
    method folds; the code for LLaVA merges between the attention and the MLP of the last block that the
    decoder uses and compares hidden states there, not keys. Its simplified version, for any model, takes
    no attention off (`alpha=0`) and scales merged tokens by 1 + log(size), which is left out here.

    Args:
        budget: a `Budget`, or the mean number of visual tokens entering a layer.
        rounds: as for `tome`; 1 folds.
        alpha: as for `turbo`; the code for LLaVA takes 100 x attention, which is 100 / 576 = 0.17 for 576
            patches, times a factor that is given with the call and has no default but 1.
    """

    name: ClassVar[str] = "folder"
    paper: ClassVar[str] = (
        "FOLDER: Accelerating Multi-modal Large Language Models with Enhanced Performance, ICCV 2025, "
        "arxiv.org/abs/2501.02430"
    )

    sees: ClassVar[Tower] = Tower(attention=True, keys=True)

    rounds: int = 1
    alpha: float = 0.17
