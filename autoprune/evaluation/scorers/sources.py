"""Where the questions and right answers of a data set are."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Sources:
    """What a format reads its questions from.

    annotations: the data set's own file or folder. question_file: LLaVA's questions, where the annotations
    do not have the ids of the answers. split: of ScienceQA.
    """

    annotations: Path
    question_file: Path | None = None
    split: str = "test"
