"""Senna's planning task: its question, its answers, and how they are counted."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ...images import load_image

SPEEDS = ("KEEP", "ACCELERATE", "DECELERATE", "STOP")
PATHS = ("STRAIGHT", "RIGHT_CHANGE", "LEFT_CHANGE", "RIGHT_TURN", "LEFT_TURN")
SCORED_PATHS = ("RIGHT_TURN", "LEFT_TURN", "STRAIGHT")
"""The paths of which the authors' evaluation counts F1."""

COMMANDS = ("go straight", "turn left", "turn right")
"""What the training data have for a navigation command."""

_ANSWER = re.compile(f"({'|'.join(SPEEDS)}), ({'|'.join(PATHS)})")
_PLANS = "SPEED plan"
_IMAGE = "<image>\n"


class Plan(NamedTuple):
    """What the car is to do in the next three seconds: one of `SPEEDS` and one of `PATHS`."""

    speed: str
    path: str

    def __str__(self) -> str:
        return f"{self.speed}, {self.path}"


def planning_question(speed: float, command: str) -> str:
    """The question of the training data.

    Args:
        speed: of the car in m/s; the training data have whole numbers, cut off.
        command: one of `COMMANDS`.

    Raises:
        ValueError: the speed is no number, 0 or more, or the command is another.
    """
    number = isinstance(speed, (int, float)) and not isinstance(speed, bool)
    if not number or not 0 <= speed < math.inf:
        raise ValueError(f"the speed must be a number of m/s, 0 or more, got {speed!r}")
    if command not in COMMANDS:
        raise ValueError(f"the command must be one of {', '.join(COMMANDS)}, got {command!r}")
    return (
        f"Your current speed is {int(speed)} m/s, the navigation command is '{command}', based on the "
        "understanding of the driving scene and the navigation information, what is your plan for the next "
        "three seconds? Please answer your SPEED plan and your PATH plan. SPEED includes KEEP, ACCELERATE "
        "and DECELERATE, and STOP, PATH includes STRAIGHT, RIGHT_CHANGE, LEFT_CHANGE, RIGHT_TURN, "
        "LEFT_TURN. For example, a correct answer format is like 'KEEP, LEFT_CHANGE'."
    )


def parse_plan(answer: str) -> Plan:
    """The plan of an answer in the form that the question asks for, with nothing else but space around it.

    Raises:
        ValueError: it has another form.
    """
    found = _ANSWER.fullmatch(answer.strip())
    if found is None:
        shown = answer if len(answer) <= 80 else f"{answer[:80]}..."
        raise ValueError(
            f"the answer {shown!r} is no plan: expected one of {', '.join(SPEEDS)}, a comma and a space, and "
            f"one of {', '.join(PATHS)}"
        )
    return Plan(*found.groups())


@dataclass(frozen=True)
class PlanningSample:
    """One question of a data file.

    images: paths of the pictures, in their order. question: with "<image>" in the pictures' places.
    """

    token: str
    images: tuple[Path, ...]
    question: str
    plan: Plan

    def messages(self) -> list[dict[str, Any]]:
        """The conversation with its pictures, for `apply_chat_template`.

        Raises:
            ValueError: a picture is missing or cannot be read.
        """
        first, *others = self.question.split(_IMAGE)
        content: list[dict[str, Any]] = [{"type": "text", "text": first}]
        for path, text in zip(self.images, others, strict=True):
            content.append({"type": "image", "image": load_image(path)})
            content.append({"type": "text", "text": text})
        return [{"role": "user", "content": content}]


def read_samples(path: str | Path, images: str | Path = "") -> list[PlanningSample]:
    """The planning questions of a file in the format of the authors' data tools; others are left out.

    Args:
        path: json: a list of {"token", "images", "conversations": [{"value"}, {"value"}]}.
        images: folder that the pictures' paths are relative to.

    Raises:
        ValueError: the file cannot be read, has another format, or holds no planning question.
    """
    try:
        records = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"the data file {str(path)!r} cannot be read: {error}") from error
    if not isinstance(records, list):
        raise ValueError(f"the data file {str(path)!r} holds no list of samples")
    samples = []
    for number, record in enumerate(records):
        try:
            sample = _sample(record, Path(images))
        except (KeyError, TypeError, IndexError, AttributeError, ValueError) as error:
            said = f"it lacks {error}" if isinstance(error, KeyError) else error
            raise ValueError(
                f"sample {number} of {str(path)!r} is not in Senna's format: {said}"
            ) from error
        samples += [] if sample is None else [sample]
    if not samples:
        raise ValueError(
            f"the data file {str(path)!r} holds no planning question ({_PLANS!r} in the question)"
        )
    return samples


def _sample(record: Mapping[str, Any], images: Path) -> PlanningSample | None:
    question, answer = (turn["value"] for turn in record["conversations"][:2])
    if _PLANS not in question:
        return None
    if not isinstance(record["images"], list):
        raise ValueError(f"its images are no list, but {record['images']!r}")
    paths = tuple(images / name for name in record["images"])
    if question.count(_IMAGE) != len(paths):
        raise ValueError(
            f"its question has {question.count(_IMAGE)} places for pictures, but there are {len(paths)}"
        )
    return PlanningSample(str(record["token"]), paths, question, parse_plan(answer))


@dataclass(frozen=True)
class PlanningScore:
    """How many plans are right, by two rules.

    accuracy: share of answers that are exactly the plan.
    unreadable: share of answers that `parse_plan` refuses.
    upstream_accuracy: share of answers that hold the plan's two words anywhere, as the authors count.
    upstream_f1: for each of `SPEEDS` and `SCORED_PATHS`, as the authors count (`upstream_f1`).
    """

    samples: int
    accuracy: float
    unreadable: float
    upstream_accuracy: float
    upstream_f1: Mapping[str, float]


def score_plans(answers: Sequence[str], plans: Sequence[Plan]) -> PlanningScore:
    """Count answers against the plans of the data.

    Raises:
        ValueError: there are none, or not as many of each.
    """
    if not plans or len(answers) != len(plans):
        raise ValueError(f"expected one answer for each plan, got {len(answers)} for {len(plans)}")
    pairs = list(zip(answers, plans, strict=True))
    parsed = [_parsed(answer) for answer in answers]
    right = sum(own == plan for own, plan in zip(parsed, plans, strict=True))
    holding = sum(plan.speed in answer and plan.path in answer for answer, plan in pairs)
    speeds = [(answer, plan.speed) for answer, plan in pairs]
    paths = [(answer, plan.path) for answer, plan in pairs]
    f1 = {key: upstream_f1(key, speeds) for key in SPEEDS}
    f1 |= {key: upstream_f1(key, paths) for key in SCORED_PATHS}
    number = len(plans)
    return PlanningScore(
        number, right / number, sum(own is None for own in parsed) / number, holding / number, f1
    )


def upstream_f1(key: str, pairs: Iterable[tuple[str, str]]) -> float:
    """F1 of one word as the authors' evaluation counts it; 0 where nothing is found.

    It differs from the usual F1: an answer that holds the word is a true positive if it also holds what is
    right, whatever that is. So one that lists all words is right for each of them.

    Args:
        pairs: each answer, and what is right.
    """
    true = false = missed = 0
    for answer, right in pairs:
        if key in answer:
            true, false = true + (right in answer), false + (right not in answer)
        else:
            missed += key in right
    return 2 * true / (2 * true + false + missed) if true else 0.0


def _parsed(answer: str) -> Plan | None:
    try:
        return parse_plan(answer)
    except ValueError:
        return None


@torch.inference_mode()
def evaluate_plans(
    model: Any,
    processor: Any,
    samples: Sequence[PlanningSample],
    method: Callable[[Any], Any] | None = None,
    max_new_tokens: int = 512,
) -> tuple[PlanningScore, list[str]]:
    """Ask every question, one at a time and greedily as the authors do; the score and the answers.

    Args:
        method: prunes each prompt, such as `AutoPrune(256, per_picture="equal")`; None prunes nothing.

    Raises:
        ValueError: a picture cannot be read.
    """
    answers = []
    with nullcontext() if method is None else method(model):
        for sample in samples:
            inputs = processor.apply_chat_template(
                sample.messages(),
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
            )
            inputs = inputs.to(model.device).to(model.dtype)
            ids = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
            new = ids[:, inputs["input_ids"].shape[1] :]
            answers.append(processor.batch_decode(new, skip_special_tokens=True)[0].strip())
    return score_plans(answers, [sample.plan for sample in samples]), answers
