"""What the page asks the model: one prompt pruned and whole, several methods, a conversation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image

from ..commands.answers import Answer, answer, answer_pruned
from ..commands.pictures import views
from ..errors import UnsupportedError
from ..loading import Loaded, prepare
from ..methods import create, options_of
from ..methods.base import Method
from ..methods.looking import look
from ..policy.budget import Budget
from ..trace import Sample
from ..viz import View

MAX_NEW_TOKENS = 64
MAX_CHARACTERS = 2000


@dataclass(frozen=True)
class Asked:
    """One prompt with both answers.

    views: what the decoder sees of the picture; empty where the family's grid is not known.
    """

    question: str
    method: Method
    pruned: Answer
    full: Answer
    sample: Sample
    views: list[View]


def build(name: str, percent: float, summary: bool = False) -> Method:
    """The method of a name under a budget.

    Args:
        percent: mean share of the visual tokens that enter a layer, above 0 and up to 100.
        summary: let one token stand for those that are dropped.

    Raises:
        ValueError: no such method, a share out of range, or a summary where the method merges by itself.
    """
    if not 0 < percent <= 100:
        raise ValueError(f"the share of tokens must be above 0 and up to 100 %, got {percent:g}")
    options: dict[str, Any] = {"merger": "summary"} if summary else {}
    if summary and "merger" not in options_of(name):
        raise ValueError(
            f"{name} merges dropped tokens by itself; switch the summary off, or choose another method"
        )
    return create(name, budget=Budget.ratio(percent / 100), **options)


def ask(loaded: Loaded, image: Image.Image, question: str, method: Method) -> Asked:
    """Both answers to a question about a picture, and what was kept of it.

    Raises:
        ValueError: no question, one that is too long, or a budget that cannot be kept.
        UnsupportedError: a method that cannot prune this model.
    """
    check_question(question)
    inputs = prepare(loaded, image, question)
    pruned, sample = answer_pruned(loaded, inputs, method, MAX_NEW_TOKENS)
    full = answer(loaded, inputs, MAX_NEW_TOKENS)
    return Asked(question, method, pruned, full, sample, _views(loaded, inputs, image))


def compare(
    loaded: Loaded, image: Image.Image, question: str, methods: Sequence[Method]
) -> tuple[Answer, list[tuple[Answer, Sample] | str], list[View]]:
    """The whole answer, of each method its answer or why it has none, and what the decoder sees.

    Raises:
        ValueError: no question, or one that is too long.
    """
    check_question(question)
    inputs = prepare(loaded, image, question)
    found: list[tuple[Answer, Sample] | str] = []
    for method in methods:
        try:
            found.append(answer_pruned(loaded, inputs, method, MAX_NEW_TOKENS))
        except (ValueError, UnsupportedError) as error:
            found.append(str(error))
    return answer(loaded, inputs, MAX_NEW_TOKENS), found, _views(loaded, inputs, image)


def check_question(question: str) -> None:
    """Raise ValueError where a question is empty or too long."""
    if not question.strip():
        raise ValueError("the question is empty; write one")
    if len(question) > MAX_CHARACTERS:
        raise ValueError(
            f"the question has {len(question)} characters; {MAX_CHARACTERS} are taken at most"
        )


def warm_up(loaded: Loaded) -> None:
    """Run the model once, as the first run loads what the others find ready."""
    image = Image.new("RGB", (64, 64), "white")
    ask(loaded, image, "what?", build("autoprune", 100))


def _views(loaded: Loaded, inputs: Any, image: Image.Image) -> list[View]:
    try:
        with torch.inference_mode():
            return views(loaded, inputs, image, look(loaded.model, inputs))
    except ValueError:
        return []
