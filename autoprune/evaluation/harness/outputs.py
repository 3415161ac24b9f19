"""What a run of the harness left: its scores, and every answer as this library's records."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .costs import read_costs
from .suites import METRICS

_ABOUT_A_SAMPLE = frozenset(
    ("doc_id", "doc", "target", "arguments", "resps", "filtered_resps", "token_counts", "doc_hash",
     "input", "input_media", "submission")
)  # fmt: skip


class Unfinished(Exception):
    """A run that lacks something; the message says what."""


@dataclass(frozen=True)
class Output:
    """One task, run under one setting.

    score: what counts. figures: all that the harness reports, by its names. answers: one record for each
    question: id, kind, prediction, correct (0 to 1; None where the task judges only all answers
    together), entering, flops, kv_bytes, mutual_information, and the rest of its cost.
    """

    task: str
    score: float
    figures: Mapping[str, float]
    answers: list[dict[str, Any]]
    versions: Mapping[str, Any]


def read_output(folder: Path, costs: Path, task: str) -> Output:
    """The output of a run of one task.

    Args:
        folder: what was given to the harness as --output_path.
        costs: the file that the plugin wrote.

    Raises:
        Unfinished: there are no results, the task or its figures are not among them, or answers are missing.
    """
    files = sorted(folder.rglob("*_results.json"))
    if not files:
        raise Unfinished("the harness wrote no results")
    results = json.loads(files[-1].read_text(encoding="utf-8"))
    leaves = list(_leaves(results, task))
    figures = {leaf: _figures(results["results"].get(leaf) or {}) for leaf in leaves}
    for leaf, found in figures.items():
        if not found:
            raise Unfinished(f"the results have no figure of {leaf}")
    paid = read_costs(costs)
    answers = [
        record for leaf in leaves for record in _answers(files[-1], leaf, task, paid, results)
    ]
    scores = [_score(task, leaf, figures[leaf]) for leaf in leaves]
    flat = {
        name if leaf == task else f"{leaf} {name}": value
        for leaf, own in figures.items()
        for name, value in own.items()
    }
    versions = {"lmms-eval": str(results.get("lmms_eval_version", ""))}
    return Output(task, sum(scores) / len(scores), flat, answers, versions)


def _leaves(results: Mapping[str, Any], task: str) -> Iterator[str]:
    """The task itself, or the tasks of a group."""
    inner = (results.get("group_subtasks") or {}).get(task)
    if not inner:
        yield task
    for name in inner or ():
        yield from _leaves(results, name)


def _figures(entry: Mapping[str, Any]) -> dict[str, float]:
    """The figures of a task without their errors, by name without its filter."""
    found: dict[str, float] = {}
    for name, value in entry.items():
        figure, _, filtered = name.partition(",")
        # What belongs to a filter is a figure; the harness adds other numbers.
        if filtered and "_stderr" not in figure and isinstance(value, (int, float)):
            found.setdefault(figure, float(value))
    return found


def _score(task: str, leaf: str, figures: Mapping[str, float]) -> float:
    wanted = METRICS.get(leaf) or METRICS.get(task) or tuple(figures)[:1]
    # With a limit some categories may have no question.
    there = [figures[name] for name in wanted if name in figures]
    if not there:
        raise Unfinished(f"the results of {leaf} have no {' or '.join(wanted)}")
    return sum(there)


def _answers(
    results_file: Path,
    leaf: str,
    task: str,
    paid: Mapping[tuple[str, int], dict[str, Any]],
    results: Mapping[str, Any],
) -> list[dict[str, Any]]:
    date = results_file.name.removesuffix("_results.json")
    path = results_file.with_name(f"{date}_samples_{leaf}.jsonl")
    if not path.is_file():
        raise Unfinished(f"the harness wrote no answers of {leaf}")
    found: dict[int, dict[str, Any]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        sample = json.loads(line)
        number = int(sample["doc_id"])
        # A task with several filters lists a question for each.
        if number in found and found[number]["correct"] is not None:
            continue
        cost = paid.get((leaf, number))
        if cost is None:
            raise Unfinished(f"question {number} of {leaf} has no record of what it cost")
        rest = {name: value for name, value in cost.items() if name not in ("task", "doc_id")}
        found[number] = {
            "id": f"{leaf}-{number}",
            "kind": task,
            "correct": correctness(sample),
        } | rest
    expected = (results.get("n-samples") or {}).get(leaf, {}).get("effective")
    if expected is not None and len(found) < int(expected):
        raise Unfinished(f"{leaf} has {len(found)} answers, expected {int(expected)}")
    return [found[number] for number in sorted(found)]


def correctness(sample: Mapping[str, Any]) -> float | None:
    """How right an answer is, 0 to 1, by what its task says of it; None where it says nothing of one answer."""
    for name, said in sample.items():
        if name in _ABOUT_A_SAMPLE:
            continue
        value = _of_metric(said)
        if value is not None and 0 <= value <= 1:
            return value
    return None


def _of_metric(said: Any) -> float | None:
    if isinstance(said, (bool, int, float)):
        return float(said)
    if not isinstance(said, Mapping):
        return None
    if isinstance(said.get("score"), (bool, int, float)):
        return float(said["score"])
    # MLVU, EgoSchema and LongVideoBench say what was read from the answer, and what is right.
    for given, right in (
        ("pred_answer", "answer"), ("pred", "ground_truth"), ("parsed_pred", "answer"),
    ):  # fmt: skip
        if given in said and right in said and not isinstance(said[given], (list, Mapping)):
            return float(str(said[given]) == str(said[right]))
    return _of_mmmu(said) if "question_type" in said else None


def _of_mmmu(said: Mapping[str, Any]) -> float:
    """By the harness's own rules, for questions with choices and for open ones."""
    from lmms_eval.tasks.mmmu import utils

    read = said["parsed_pred"][0]
    if said["question_type"] == "multiple-choice":
        return float(utils.eval_multi_choice(said["answer"], read))
    return float(utils.eval_open(said["answer"], read))
