"""What the task file asks for: the picture of a question, and whether an answer is right."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from autoprune.evaluation.tasks import is_right


def pictures(doc: Mapping[str, Any]) -> list[Any]:
    """The one picture of a question."""
    return [doc["image"].convert("RGB")]


def process_results(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """Right or wrong, as `autoprune compare` judges it."""
    return {"accuracy": float(is_right(results[0], [doc["answer"]]))}
