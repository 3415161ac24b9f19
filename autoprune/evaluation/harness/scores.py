"""The harness's own scores of every setting, beside the unpruned model's and those that were published."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..results import Row
from ..settings import Setting
from ..tasks import is_right
from .outputs import Output
from .suites import Published, published

Score = Row
"""One setting: what it spent, and for each task its score, its share of the unpruned model's, and what was
published."""


def scores(
    settings: Sequence[Setting], outputs: Mapping[Setting, Mapping[str, Output]], suite: str
) -> list[Score]:
    """One record for each setting that ran, the unpruned model first."""
    full = outputs[settings[0]]
    return [_score(setting, outputs[setting], full, suite) for setting in settings]


def _score(
    setting: Setting, own: Mapping[str, Output], full: Mapping[str, Output], suite: str
) -> Score:
    answers = [record for output in own.values() for record in output.answers]
    known = published(suite, setting.label, setting.budget)
    shares = [own[task].score / full[task].score for task in full if full[task].score]
    return {
        "method": setting.label,
        "budget": setting.budget,
        "tokens_entering": _mean(answers, "entering"),
        "flops_share": _sum(answers, "flops") / _sum(answers, "flops_full"),
        "kv_bytes_share": _sum(answers, "kv_bytes") / _sum(answers, "kv_bytes_full"),
        "seconds_per_answer": _mean(answers, "seconds"),
        "relative": sum(shares) / len(shares) if len(shares) == len(full) else None,
        "agreement": sum(_agreement(own[task], full[task]) for task in full) / len(full),
        "published": next((figure.value for figure in known if figure.task is None), None),
        "tasks": {task: _of_task(task, own, full, known) for task in full},
    }


def _of_task(
    task: str,
    own: Mapping[str, Output],
    full: Mapping[str, Output],
    known: Sequence[Published],
) -> dict[str, Any]:
    score, best = own[task].score, full[task].score
    return {
        "score": score,
        "relative": score / best if best else None,
        "agreement": _agreement(own[task], full[task]),
        "published": next((figure.value for figure in known if figure.task == task), None),
        "questions": len(own[task].answers),
        "figures": dict(own[task].figures),
    }


def _agreement(own: Output, full: Output) -> float:
    """Share of questions that are answered as the unpruned model answers them, right or wrong."""
    pairs = list(zip(own.answers, full.answers, strict=True))
    same = [is_right(one["prediction"], [other["prediction"]]) for one, other in pairs]
    return sum(same) / len(same)


def _sum(answers: Sequence[Mapping[str, Any]], name: str) -> float:
    return float(sum(record[name] for record in answers))


def _mean(answers: Sequence[Mapping[str, Any]], name: str) -> float:
    return _sum(answers, name) / len(answers)


def columns(table: Sequence[Score], tasks: Sequence[str]) -> dict[str, list[str]]:
    """The table for a reader, by headings: what is the same for all tasks, then a column for each."""
    found = {
        "method": [score["method"] for score in table],
        "budget": [score["budget"] for score in table],
        "tokens": [f"{score['tokens_entering']:.4g}" for score in table],
        "FLOPs": [f"{score['flops_share']:.1%}" for score in table],
        "KV": [f"{score['kv_bytes_share']:.1%}" for score in table],
        "of full": [_share(score["relative"]) for score in table],
    }
    if any(score["published"] is not None for score in table):
        found["published"] = [
            "" if score["published"] is None else f"{score['published']:.1f}%" for score in table
        ]
    found["agreement"] = [_share(score["agreement"]) for score in table]
    return found | {task: [_task_cell(score, task) for score in table] for task in tasks}


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def _task_cell(score: Score, task: str) -> str:
    """A task's score, its share of the unpruned model's, and what was published."""
    own = score["tasks"][task]
    text = f"{own['score']:.4g}"
    if own["relative"] is not None:
        text += f" ({own['relative']:.1%})"
    return text if own["published"] is None else f"{text}, published {own['published']:g}"


def to_text(table: Sequence[Score], tasks: Sequence[str], suite: str) -> str:
    """The part of the report that holds the harness's scores, as Markdown."""
    shown = columns(table, tasks)
    lines = ["## Scores of lmms-eval", "", _line(list(shown)), _line(["---"] * len(shown))]
    lines += [*map(_line, zip(*shown.values(), strict=True)), "", _EXPLAINED, ""]
    sources = dict.fromkeys(
        f"* {figure.source}: {figure.model}"
        for score in table
        for figure in published(suite, score["method"], score["budget"])
    )
    if sources:
        lines += [
            "Published figures, as they are printed (a budget there may count other tokens):",
            "",
        ]
        lines += [*sources, ""]
    return "\n".join(lines)


_EXPLAINED = (
    "Scores are as lmms-eval computes them, in its units. `of full`: mean over the tasks of the score over the "
    "unpruned model's. `agreement`: share of questions that are answered as the unpruned model answers them. "
    "`tokens`: mean visual tokens entering a layer."
)


def _line(values: Sequence[str]) -> str:
    return f"| {' | '.join(value.replace('|', chr(92) + '|') for value in values)} |"
