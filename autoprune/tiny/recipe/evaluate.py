"""Accuracy on held-out questions, per kind.

python -m autoprune.tiny.recipe.evaluate --questions 2000
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from autoprune import tiny
from autoprune.tiny.questions import EASY, EXTRA, HARD, Question, difficulty_of
from autoprune.tiny.scenes import Scene

Context = Callable[[], AbstractContextManager[Any]]


@dataclass(frozen=True)
class Result:
    """Predictions of a run, question by question."""

    kinds: tuple[str, ...]
    questions: tuple[str, ...]
    answers: tuple[str, ...]
    predictions: tuple[str, ...]
    correct: tuple[bool, ...]

    def accuracy(self, kinds: Sequence[str] | None = None) -> float:
        """Share of right answers over the questions of `kinds` (default: all), nan if none."""
        hits = [
            hit
            for kind, hit in zip(self.kinds, self.correct, strict=True)
            if kinds is None or kind in kinds
        ]
        return sum(hits) / len(hits) if hits else float("nan")

    def per_kind(self) -> dict[str, float]:
        """Accuracy of every kind that was asked."""
        return {kind: self.accuracy([kind]) for kind in dict.fromkeys(self.kinds)}


def accuracy(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    questions: Sequence[tuple[Scene, Question]],
    context: Context = nullcontext,
    batch_size: int = 50,
    show_progress: bool = False,
) -> Result:
    """Ask every question, greedily decoded in left-padded batches.

    Parameters
    ----------
    questions : (scene, question) pairs, as `heldout_questions` gives them
    context : called once per batch for a context manager to generate in, for instance
        `lambda: AutoPrune(budget=16)(model)`
    """
    predictions: list[str] = []
    starts: Any = range(0, len(questions), batch_size)
    for start in track(starts, "answering", disable=not show_progress):
        batch = questions[start : start + batch_size]
        with context():
            predictions += _answer_batch(model, processor, batch)
    asked = [question for _, question in questions]
    hits = [
        tiny.is_correct(question, text) for question, text in zip(asked, predictions, strict=True)
    ]
    return Result(
        kinds=tuple(question.kind for question in asked),
        questions=tuple(question.text for question in asked),
        answers=tuple(question.answer for question in asked),
        predictions=tuple(predictions),
        correct=tuple(hits),
    )


def _answer_batch(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    batch: Sequence[tuple[Scene, Question]],
) -> list[str]:
    inputs = processor(
        images=[scene.image for scene, _ in batch],
        text=[tiny.prompt(processor, question.text) for _, question in batch],
        padding=True,
        return_tensors="pt",
    ).to(model.device, model.dtype)
    longest = max(len(processor.tokenizer(question.answer).input_ids) for _, question in batch)
    # A few tokens of room beyond the right answers: running on is a mistake, too.
    ids = model.generate(**inputs, max_new_tokens=longest + 4, do_sample=False)
    new = ids[:, inputs["input_ids"].shape[1] :]
    return [text.strip() for text in processor.batch_decode(new, skip_special_tokens=True)]


def show(result: Result, console: Console) -> None:
    """Print accuracy per kind as a table."""
    table = Table("kind", "difficulty", "questions", "accuracy")
    for kind, share in result.per_kind().items():
        table.add_row(kind, difficulty_of(kind), str(result.kinds.count(kind)), f"{share:.3f}")
    table.add_section()
    for name, group in (("easy", EASY), ("hard", HARD)):
        count = sum(kind in group for kind in result.kinds)
        table.add_row(f"all {name}", name, str(count), f"{result.accuracy(group):.3f}")
    console.print(table)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure the embedded model (or a folder of weights) without pruning."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--questions", type=int, default=2000)
    parser.add_argument("--kinds", nargs="+", default=list(EASY + HARD + EXTRA))
    parser.add_argument("--model", type=Path, default=tiny.path(), help="folder of weights")
    parser.add_argument("--batch-size", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("tiny-accuracy.json"))
    options = parser.parse_args(arguments)
    model, processor = tiny.load(folder=options.model)
    questions = tiny.heldout_questions(options.questions, options.kinds, options.seed)
    with torch.no_grad():
        result = accuracy(
            model, processor, questions, batch_size=options.batch_size, show_progress=True
        )
    console = Console()
    show(result, console)
    record = {"seed": options.seed, "accuracy": result.per_kind(), **asdict(result)}
    options.output.write_text(json.dumps(record, indent=1))
    console.print(f"predictions written to {options.output}")


if __name__ == "__main__":
    main()
