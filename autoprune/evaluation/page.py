"""The results as one page: a table that can be sorted, the plot, and the answers that changed."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

from PIL import Image

from ..images import load_image
from ..viz import information_by_kind, to_png
from ..viz.page import Html, code, heading, page, paragraph, picture, table
from .plot import plot
from .results import Row
from .run_directory import Answers
from .settings import Setting
from .tables import HEADINGS, cells, infeasible, setup
from .tasks import Task, normalised

MOST_CHANGES = 24
"""Changed answers that a page shows, each with its picture."""

_FIGURES = (
    "tokens_entering", "flops_share", "kv_bytes_share", "accuracy", "relative", "agreement", "difference",
    "prefill_ms",
)  # fmt: skip
_THUMBNAIL = 160  # pixels of a picture's longer side


@dataclass(frozen=True)
class Change:
    """A question whose answer pruning changed, and whether each answer is right."""

    task: Task
    label: str
    budget: str
    full: str
    full_is_right: bool
    pruned: str
    pruned_is_right: bool


def changed_answers(
    tasks: Sequence[Task], settings: Sequence[Setting], answers: Sequence[Answers | None]
) -> list[Change]:
    """Answers that differ from those of the unpruned model, the settings taking turns.

    Args:
        tasks: in the order of the answers.
        settings: the reference first.
        answers: of each setting; None where it could not run.
    """
    full = answers[0]
    assert full is not None
    of_settings = [
        _changed(tasks, setting, full, found)
        for setting, found in zip(settings[1:], answers[1:], strict=True)
        if found is not None
    ]
    return [change for turn in zip_longest(*of_settings) for change in turn if change is not None]


def _changed(
    tasks: Sequence[Task], setting: Setting, full: Answers, found: Answers
) -> Iterator[Change]:
    for number, task in enumerate(tasks):
        plain, pruned = full.predictions[number], found.predictions[number]
        if normalised(plain) != normalised(pruned):
            right = bool(full.correct[number]), bool(found.correct[number])
            yield Change(task, setting.label, setting.budget, plain, right[0], pruned, right[1])


def to_page(
    rows: Sequence[Row], config: Mapping[str, Any], baseline: str, changes: Sequence[Change] = ()
) -> str:
    """The whole page as HTML; nothing in it is loaded from elsewhere.

    Args:
        rows, config, baseline: as for `write_report`.
        changes: of `changed_answers`; the first `MOST_CHANGES` are shown.
    """
    parts = [code(config["command"]), *map(paragraph, setup(config))]
    parts += [picture(to_png(plot(rows, baseline)), "Accuracy against decoder prefill FLOPs")]
    parts += [heading("All settings"), paragraph(_explained(baseline)), _settings(rows)]
    kinds = list(config["kinds"])
    if len(kinds) > 1:
        parts += [heading("Accuracy of each kind of question"), _kinds(rows, kinds)]
    parts += _information(rows)
    if changes:
        shown = changes[:MOST_CHANGES]
        count = f"{len(shown)} of {len(changes)} answers that pruning changed."
        parts += [heading("Answers that changed"), paragraph(count), _changes(shown)]
    refused = infeasible(rows)
    if refused:
        parts += [heading("Infeasible"), *map(paragraph, refused)]
    return page("Comparison of pruning methods", parts)


def _explained(baseline: str) -> str:
    return (
        "A click on a heading sorts. The agreement is the share of questions answered as the unpruned model "
        f"answers them. The difference is to {baseline} at the same budget; * where its interval leaves out 0. "
        "Square brackets hold 95 % confidence intervals."
    )


def _settings(rows: Sequence[Row]) -> Html:
    first, *others = HEADINGS
    shown, values = [], []
    for row in rows:
        name, *figures = cells(row)
        shown.append([name, row["budget"], *figures])
        values.append([name, row["budget"], *(row[figure] for figure in _FIGURES)])
    return table((first, "budget", *others), shown, values)


def _kinds(rows: Sequence[Row], kinds: Sequence[str]) -> Html:
    ran = [row for row in rows if row["status"] == "ok"]
    values = [[row["method"], row["budget"], *(row[f"accuracy_{k}"] for k in kinds)] for row in ran]
    shown = [[name, budget, *(f"{v:.3f}" for v in figures)] for name, budget, *figures in values]
    return table(("method", "budget", *kinds), shown, values)


def _information(rows: Sequence[Row]) -> list[Html]:
    """The information of each kind of question, where a method measured it."""
    results = {"rows": rows}
    try:
        light, dark = (
            to_png(information_by_kind(results, dark=is_dark)) for is_dark in (False, True)
        )
    except ValueError:
        return []
    title = "Information of each kind of question"
    words = "Little mutual information is a hard question, much an easy one."
    return [heading(title), picture(light, title, words, dark)]


def _changes(changes: Sequence[Change]) -> Html:
    head = ("picture", "question", "right answer", "all tokens", "pruned", "method", "budget")
    shown, values = [], []
    for change in changes:
        texts = [
            change.task.question,
            " or ".join(change.task.answers),
            _judged(change.full, change.full_is_right),
            _judged(change.pruned, change.pruned_is_right),
            change.label,
            change.budget,
        ]
        shown.append([picture(_thumbnail(change.task.image), "the picture"), *texts])
        values.append([change.task.id, *texts])
    return table(head, shown, values, texts=True)


def _judged(answer: str, is_right: bool) -> str:
    return f"{answer} ({'right' if is_right else 'wrong'})"


def _thumbnail(image: Image.Image | Path) -> bytes:
    small = load_image(image) if isinstance(image, Path) else image.convert("RGB")
    small.thumbnail((_THUMBNAIL, _THUMBNAIL))
    buffer = io.BytesIO()
    small.save(buffer, format="JPEG", quality=85)
    return buffer.getvalue()
