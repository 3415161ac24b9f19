"""The page of a comparison: every row, sortable; the answers that changed, with their pictures."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from autoprune import AutoPrune, Budget, create, tiny
from autoprune.evaluation import Options, Setting, compare, embedded_tasks
from autoprune.evaluation.page import MOST_CHANGES, changed_answers, to_page
from autoprune.evaluation.run_directory import Answers
from autoprune.evaluation.settings import REFERENCE
from autoprune.evaluation.tables import HEADINGS
from autoprune.evaluation.tasks import Task, normalised
from tests.pages import Page

SETTINGS = [
    Setting("autoprune", "1/9", AutoPrune(Budget.ratio(1 / 9))),
    Setting("random <b>", "4", create("random", Budget.tokens(4))),
    Setting("deep", "1/9", AutoPrune(Budget.ratio(1 / 9), mi_layer=40)),
]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    tasks = embedded_tasks(4, ["colour", "count"])
    rows = compare(*tiny.load(), SETTINGS, tasks, folder, Options(batch_size=3, timing=False))
    return folder, rows, tasks, Page((folder / "report.html").read_text("utf-8"))


def test_the_sortable_table_has_every_row_with_its_figures(finished):
    _, rows, _, page = finished
    table, keys = page.tables[0], page.keys[0]
    assert page.sortable[0]
    assert table[0] == [HEADINGS[0], "budget", *HEADINGS[1:]]
    assert [row[0] for row in table[1:]] == [row["method"] for row in rows]
    for row, key in zip(rows, keys[1:], strict=True):
        assert key[:2] == [row["method"], row["budget"]]
        figure = row["accuracy"]
        assert key[5] == ("" if figure is None else str(figure))
    kinds = page.tables[1]
    assert kinds[0] == ["method", "budget", "colour", "count"] and len(kinds) == 4
    assert kinds[2][2] == f"{rows[1]['accuracy_colour']:.3f}"


def test_nothing_is_loaded_from_elsewhere_and_labels_are_text(finished):
    *_, page = finished
    assert page.loaded and all(source.startswith("data:image/") for source in page.loaded)
    assert "b" not in page.tags and "random <b>" in page.text
    assert "mi_layer is 40" in page.text


def test_the_changed_answers_are_those_of_the_predictions(finished):
    folder, _, tasks, page = finished
    predictions = {}
    for path in (folder / "predictions").glob("*.jsonl"):
        lines = map(json.loads, path.read_text().splitlines())
        predictions[path.stem] = {line["id"]: line for line in lines}
    full = predictions.pop("full__1")
    changed = {
        (full[one]["prediction"], line["prediction"])
        for answers in predictions.values()
        for one, line in answers.items()
        if normalised(line["prediction"]) != normalised(full[one]["prediction"])
    }
    assert changed
    table = page.tables[-1]
    assert {(row[3].rsplit(" (")[0], row[4].rsplit(" (")[0]) for row in table[1:]} == changed
    questions = {task.question for task in tasks}
    assert {row[1] for row in table[1:]} <= questions


def answers(texts):
    nothing, right = np.ones(len(texts)), np.array([text == "r" for text in texts])
    return Answers(["all"] * len(texts), list(texts), right, nothing, nothing, nothing, nothing)


def test_settings_take_turns_and_equal_answers_are_left_out(tmp_path):
    Image.new("RGB", (400, 100)).save(tmp_path / "p.png")
    tasks = [Task(str(n), "all", f"question {n}", ("r",), tmp_path / "p.png") for n in range(3)]
    given = [answers("rrb"), answers("bbr"), None, answers(["The R.", "r", "x"])]
    settings = [REFERENCE, *SETTINGS]
    settings[2:] = [SETTINGS[2], SETTINGS[1]]
    changes = changed_answers(tasks, settings, given)
    assert [(c.task.id, c.label, c.full, c.pruned) for c in changes] == [
        ("0", "autoprune", "r", "b"),
        ("2", "random <b>", "b", "x"),
        ("1", "autoprune", "r", "b"),
        ("2", "autoprune", "b", "r"),
    ]
    assert [(c.full_is_right, c.pruned_is_right) for c in changes][-1] == (False, True)


def test_so_many_changes_are_shown_and_the_page_says_of_how_many(finished):
    folder, rows, tasks, _ = finished
    config = json.loads((folder / "results.json").read_text())
    given = [answers("r" * 8), answers("b" * 8)]
    changes = changed_answers(tasks, [REFERENCE, SETTINGS[0]], given) * 10
    page = Page(to_page(rows, config, "autoprune", changes))
    assert f"{MOST_CHANGES} of 80 answers that pruning changed." in page.text
    assert len(page.tables[-1]) == 1 + MOST_CHANGES
