"""The benchmarks that are run together, at which budgets, and what was published of them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

SHAPES = "shapes"
_PUBLISHED = Path(__file__).parent / "published.json"


@dataclass(frozen=True)
class Suite:
    """tasks: of lmms-eval, by its names. budgets: as the command line takes them."""

    name: str
    about: str
    tasks: tuple[str, ...]
    budgets: tuple[str, ...]


_PAPER_TASKS = ("mme", "mmbench_en_dev_static", "scienceqa_img", "gqa", "textvqa_val")
SUITES = {
    suite.name: suite
    for suite in (
        Suite(
            SHAPES,
            "questions about drawn scenes, for the embedded model; needs nothing",
            (),
            ("1/2", "1/3", "1/4", "1/6", "1/9"),
        ),
        Suite(
            "paper-llava-1.5", "LLaVA-1.5: 192, 128, 64 of 576", _PAPER_TASKS, ("192", "128", "64")
        ),
        Suite(
            "paper-llava-next",
            "LLaVA-NeXT: 640, 320, 160 of 2880",
            _PAPER_TASKS,
            ("640", "320", "160"),
        ),
        Suite(
            "paper-qwen2-vl",
            "Qwen2-VL: the rebuttal's 600 and 400 tokens, and a third, two ninths, a ninth",
            ("mmbench_en_dev_static", "pope", "textvqa_val"),
            ("600", "400", "33.3%", "22.2%", "11.1%"),
        ),
        Suite("mmmu", "MMMU, validation", ("mmmu_val",), ("75%", "50%", "11.1%")),
        Suite(
            "coco-caption",
            "captions of COCO 2017, validation",
            ("coco2017_cap_val",),
            ("75%", "50%", "11.1%"),
        ),
        Suite(
            "video",
            "five benchmarks of videos, 32 frames",
            ("mvbench", "egoschema_subset", "longvideobench_val_v", "videomme", "mlvu_dev"),
            ("25%", "20%", "15%", "10%"),
        ),
    )
}

METRICS: dict[str, tuple[str, ...]] = {
    "mme": ("mme_perception_score", "mme_cognition_score"),
    "pope": ("pope_f1_score",),
    "coco2014_cap_val": ("coco_CIDEr",),
    "coco2017_cap_val": ("coco_CIDEr",),
    "coco_karpathy_test": ("coco_CIDEr",),
    "mmbench_en_dev_static": ("gpt_eval_score",),
}
"""What a task's score is where the harness reports several figures; these are added up. The first one of any
other task."""


_PUBLISHED_AS = {"autoprune_reference": "autoprune"}


@dataclass(frozen=True)
class Published:
    """A printed figure; `task` is None for the mean share of the unpruned model's score, in per cent."""

    value: float
    source: str
    model: str
    task: str | None = None


def suite_of(name: str) -> Suite:
    """A suite by name.

    Raises:
        ValueError: there is none; those that there are, are named.
    """
    if name not in SUITES:
        raise ValueError(f"there is no suite {name!r}; choose one of {', '.join(SUITES)}")
    return SUITES[name]


def published(suite: str, method: str, budget: str) -> list[Published]:
    """What papers print for a method of a suite at a budget; "full" for the unpruned model."""
    asked = (suite, _PUBLISHED_AS.get(method, method), budget)
    return [figure for *given, figure in _all() if tuple(given) == asked]


@cache
def _all() -> list[tuple[str, str, str, Published]]:
    return list(_read(json.loads(_PUBLISHED.read_text(encoding="utf-8"))))


def _read(record: dict[str, Any]) -> Iterator[tuple[str, str, str, Published]]:
    for table in (*record["means"], *record["scores"]):
        task = table.get("task")
        given = (table["source"], table["model"], task)
        if "full" in table:
            yield table["suite"], "full", "1", Published(table["full"], *given)
        for method, values in table["methods"].items():
            for budget, value in zip(table["budgets"], values, strict=True):
                yield table["suite"], method, budget, Published(value, *given)
