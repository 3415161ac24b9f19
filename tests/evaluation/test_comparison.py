"""A comparison asks every question once, says what was really spent, and can be continued."""

from __future__ import annotations

import csv
import importlib
import inspect
import json
import linecache
import multiprocessing
import os
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import autoprune
from autoprune import AutoPrune, AutoPruneReference, Budget, tiny
from autoprune.errors import UnsupportedError
from autoprune.evaluation import (
    Options,
    Setting,
    Task,
    answering,
    compare,
    embedded_tasks,
    report,
    tables,
    timing,
)
from autoprune.evaluation.batches import prepare
from autoprune.evaluation.encoding import encoder
from autoprune.evaluation.results import results
from autoprune.evaluation.run_directory import Answers
from autoprune.evaluation.settings import REFERENCE
from autoprune.evaluation.statistics import FEWEST
from autoprune.evaluation.timing import PROMPTS, timed_batches
from autoprune.evaluation.workers import run_all

KINDS = ["colour", "count"]
PER_KIND = 4
QUESTIONS = PER_KIND * len(KINDS)
SETTINGS = [
    Setting("autoprune", "1/4", AutoPrune(Budget.ratio(1 / 4))),
    Setting("random", "1/4", autoprune.create("random", Budget.ratio(1 / 4))),
    Setting("random", "8", autoprune.create("random", Budget.tokens(8))),
]
BRISK = Options(batch_size=3, timing=False)


@pytest.fixture(scope="module")
def loaded():
    return tiny.load()


@pytest.fixture(scope="module")
def tasks():
    return embedded_tasks(PER_KIND, KINDS)


@pytest.fixture(scope="module")
def finished(loaded, tasks, tmp_path_factory):
    """The rows of a comparison, and its folder."""
    folder = tmp_path_factory.mktemp("run") / "new" / "folder"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timing, "BATCHES", 2)
        return compare(*loaded, SETTINGS, tasks, folder, Options(batch_size=3)), folder


@pytest.fixture
def asked(monkeypatch):
    """The number of prompts of every batch that the model is asked."""
    sizes, original = [], answering.generate

    def count(model, processor, method, inputs, max_new_tokens):
        sizes.append(len(inputs["input_ids"]))
        return original(model, processor, method, inputs, max_new_tokens)

    monkeypatch.setattr(answering, "generate", count)
    return sizes


def predictions(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in (folder / "predictions").iterdir()}


def test_the_unpruned_model_comes_first_and_every_setting_is_a_row(finished):
    rows, _ = finished
    assert [(row["method"], row["budget"]) for row in rows] == [
        ("full", "1"),
        ("autoprune", "1/4"),
        ("random", "1/4"),
        ("random", "8"),
    ]
    assert all(row["questions"] == QUESTIONS for row in rows)


def test_what_is_reported_is_what_entered(finished):
    full, first, second, third = finished[0]
    assert full["tokens_entering"] == full["tokens_asked"] == 144
    assert full["flops_share"] == full["kv_bytes_share"] == full["relative"] == 1
    for row in (first, second):
        assert row["tokens_entering"] == row["tokens_asked"] == 36
        assert 0.2 < row["flops_share"] < 0.3
    assert third["tokens_entering"] == 8
    assert third["kv_bytes_share"] < second["kv_bytes_share"]


def test_differences_are_to_autoprune_at_the_same_budget(finished):
    full, first, second, third = finished[0]
    assert first["difference"] == 0
    assert second["difference"] == pytest.approx(second["accuracy"] - first["accuracy"], abs=1e-6)
    assert full["difference"] is third["difference"] is None


def test_mutual_information_is_reported_where_it_is_measured(finished):
    _, first, second, _ = finished[0]
    assert first["mutual_information_count"] > 0
    assert second["mutual_information_count"] is None


def test_prefill_times_are_of_one_prompt(finished):
    for row in finished[0]:
        assert 0 < row["prefill_ms"] < 1000
        assert row["prefill_speedup"] > 0
        # One batch of prompts was timed.
        assert row["prefill_ms_low"] is row["prefill_speedup_high"] is None


def test_every_figure_has_an_interval(loaded, tmp_path, monkeypatch):
    monkeypatch.setattr(timing, "PROMPTS", 3)
    monkeypatch.setattr(timing, "BATCHES", FEWEST)
    settings = [SETTINGS[0], Setting("random", "1/4", autoprune.create("random", 3))]
    # Questions of one kind with texts of different lengths.
    tasks = [replace(task, kind="all") for task in embedded_tasks(3 * FEWEST // len(KINDS), KINDS)]
    full, pruned, floor = compare(*loaded, settings, tasks, tmp_path)
    for name in ("flops_share", "kv_bytes_share", "accuracy", "prefill_ms", "prefill_speedup"):
        assert pruned[f"{name}_low"] < pruned[name] < pruned[f"{name}_high"]
    for row in (pruned, floor):
        # A budget in tokens is the same for every prompt, its share of the FLOPs is not.
        bounds = {row[f"tokens_entering{bound}"] for bound in ("", "_low", "_high")}
        assert bounds == {row["tokens_entering"]}
        assert row["flops_share_high"] - row["flops_share_low"] < 0.05
    assert full["prefill_speedup_low"] == full["prefill_speedup_high"] == 1
    line = f"{pruned['flops_share']:.1%} [{pruned['flops_share_low']:.1%}, "
    assert line in (tmp_path / "report.md").read_text()


def test_what_is_spent_is_summed_over_all_questions_and_not_by_kind():
    kinds = ["short"] * 30 + ["long"] * 10
    full, pruned = np.repeat([10.0, 100.0], [30, 10]), np.repeat([5.0, 10.0], [30, 10])
    given = [
        Answers(kinds, [""] * 40, np.ones(40, bool), spent, spent, spent, np.full(40, np.nan))
        for spent in (full, pruned)
    ]
    settings = [REFERENCE, SETTINGS[0]]
    _, row = results(settings, given, ["short", "long"], {}, "autoprune")
    assert row["tokens_entering"] == 250 / 40
    assert row["flops_share"] == row["kv_bytes_share"] == pytest.approx(250 / 1300, abs=1e-6)


def test_agreement_counts_answers_that_are_the_unpruned_models_right_or_wrong():
    kinds = ["short"] * 30 + ["long"] * 10
    right, nothing = np.ones(40, bool), np.ones(40)
    full = ["Red ring."] * 30 + ["a long answer"] * 10
    # Of 30 the first 12 differ; of 10 the first 5. Case, points and articles make no difference.
    other = ["blue"] * 12 + ["the red ring"] * 18 + ["long"] * 5 + ["Long answer"] * 5
    given = [
        Answers(kinds, texts, right, nothing, nothing, nothing, np.full(40, np.nan))
        for texts in (full, other)
    ]
    first, row = results([REFERENCE, SETTINGS[0]], given, ["short", "long"], {}, "autoprune")
    assert first["agreement"] == first["agreement_low"] == 1
    assert row["agreement"] == pytest.approx((18 / 30 + 5 / 10) / 2)
    # Two binomial shares, of 30 and 10 questions: 1.96 times half of the root of .24 / 30 + .25 / 10.
    assert row["agreement_low"] == pytest.approx(0.55 - 0.178, abs=0.03)
    assert row["agreement_high"] == pytest.approx(0.55 + 0.178, abs=0.03)
    assert row["relative"] == 1


def test_the_agreement_is_what_the_predictions_show(finished):
    rows, folder = finished
    texts = {
        name: [json.loads(line)["prediction"] for line in text.splitlines()]
        for name, text in predictions(folder).items()
    }
    same = [
        a == b
        for a, b in zip(*(texts[f"{n}.jsonl"] for n in ("full__1", "random__8")), strict=True)
    ]
    assert rows[-1]["agreement"] == pytest.approx(np.mean(same))
    report = (folder / "report.md").read_text()
    assert "| of full | agreement | difference |" in report


@pytest.mark.parametrize(
    ("tasks", "starts"),
    [
        (5, [0]),
        (8, [0]),
        (15, [3]),
        (17, [0, 8]),
        (96, list(range(0, 96, 8))),
        (8 * 36, list(range(8, 288, 24))),
    ],
)
def test_timed_prompts_are_spread_and_none_counts_twice(tasks, starts):
    found = timed_batches(range(tasks))
    assert [batch[0] for batch in found] == starts
    assert {len(batch) for batch in found} == {min(tasks, PROMPTS)}


def test_a_few_batches_are_timed_as_often_as_many(monkeypatch):
    seconds = iter(range(1000))
    taken = []

    def counted(model, inputs, setting):
        taken.append(setting.label)
        return next(seconds)

    monkeypatch.setattr(timing, "_seconds", counted)
    inputs = {"input_ids": [[0]] * 4}
    found = timing.prefill_milliseconds(None, [inputs] * 3, SETTINGS[:2])
    assert np.shape(found) == (2, 3)
    assert taken == [setting.label for setting in SETTINGS[:2]] * 3 * 5
    # The first of five turns does not count: at 2, 4, 6 and 8 the first setting starts.
    assert found[0][0] == 1000 * 5 / 4


def test_answers_are_those_of_the_plain_model_one_by_one(finished, loaded, tasks):
    lines = predictions(finished[1])["full__1.jsonl"].splitlines()
    found = {record["id"]: record["prediction"] for record in map(json.loads, lines)}
    for task in tasks:
        assert found[task.id] == tiny.answer(*loaded, task.image, task.question)


def test_the_folder_holds_the_whole_record(finished):
    rows, folder = finished
    with (folder / "results.csv").open() as file:
        table = list(csv.DictReader(file))
    assert list(table[0]) == list(rows[0])
    assert [float(line["accuracy"]) for line in table] == [row["accuracy"] for row in rows]
    assert table[0]["mutual_information_count"] == ""
    assert json.loads((folder / "results.json").read_text())["rows"] == rows
    report = (folder / "report.md").read_text()
    assert all(words in report for words in ("| random |", "## Budget 1/4", "| colour | count |"))
    overview = [f"| autoprune | {rows[1]['accuracy']:.3f} | - |"]
    overview.append(f"| random | {rows[2]['accuracy']:.3f} | {rows[3]['accuracy']:.3f} |")
    assert "\n".join(["| method | 1/4 | 8 |", "|---|--:|--:|", *overview]) in report
    with Image.open(folder / "accuracy_vs_flops.png") as picture:
        assert picture.width > picture.height
    record = json.loads(predictions(folder)["autoprune__1-4.jsonl"].splitlines()[0])
    assert set(record) == {
        "id", "kind", "prediction", "correct", "entering", "flops", "kv_bytes", "mutual_information",
    }  # fmt: skip


def test_a_verdict_needs_more_than_a_handful_of_questions(finished):
    report = (finished[1] / "report.md").read_text()
    assert "*" not in "".join(line for line in report.splitlines() if line.startswith("| random"))


def test_a_clear_difference_is_marked(loaded, tmp_path):
    settings = [SETTINGS[0], Setting("random", "1/4", autoprune.create("random", 3))]
    options = Options(timing=False)
    *_, floor = compare(*loaded, settings, embedded_tasks(10, ["sign"]), tmp_path, options)
    assert floor["difference_high"] < 0
    assert f"{floor['difference']:+.3f}* [" in (tmp_path / "report.md").read_text()


def test_columns_are_grouped_and_documented(finished):
    page = (Path(__file__).parents[2] / "docs" / "compare.md").read_text()
    names = list(finished[0][0])
    for name in names:
        base = name.removesuffix("_low").removesuffix("_high")
        for kind in KINDS:
            base = base.replace(f"_{kind}", "_KIND")
        assert f"`{base}`" in page
    assert names.index("accuracy_colour") + 3 == names.index("accuracy_count")


def test_what_reads_like_the_figure_is_left_out_and_what_is_off_the_budget_is_not():
    row = {"method": "m", "budget": "36", "status": "ok", "tokens_asked": 36, "accuracy": 0.5}
    assert report._overview([row | {"tokens_entering": 35.9}])[-1] == "| m | 0.500 |"
    assert report._overview([row | {"tokens_entering": 35.5}])[-1] == "| m | 0.500 (35.5) |"
    for bounds, shown in (((0.4999, 0.5001), "0.500"), ((0.48, 0.52), "0.500 [0.480, 0.520]")):
        low, high = bounds
        same = {"accuracy": 0.5, "accuracy_low": low, "accuracy_high": high}
        assert tables._figure(same, "accuracy", ".3f") == shown
    clear = {"difference": 0.0003, "difference_low": 0.0001, "difference_high": 0.0004}
    assert tables._verdict(clear, brief=False) == "+0.000* [+0.000, +0.000]"


def test_a_finished_run_is_not_asked_again(finished, loaded, tasks, asked):
    rows, folder = finished
    again = compare(*loaded, SETTINGS, tasks, folder, BRISK)
    assert asked == []
    assert [row["accuracy"] for row in again] == [row["accuracy"] for row in rows]


@pytest.mark.parametrize(
    ("cut", "sizes"),
    [(10, [2]), (5000, [3, 3, 2])],
    ids=["a torn last line", "nothing but a torn line"],
)
def test_a_run_that_was_cut_goes_on_where_it_stopped(loaded, tasks, tmp_path, asked, cut, sizes):
    compare(*loaded, SETTINGS, tasks, tmp_path, BRISK)
    whole = predictions(tmp_path)
    path = tmp_path / "predictions" / "random__1-4.jsonl"
    path.write_bytes(path.read_bytes()[: max(20, path.stat().st_size - cut)])
    (tmp_path / "predictions" / "random__8.jsonl").unlink()
    asked.clear()
    compare(*loaded, SETTINGS, tasks, tmp_path, BRISK)
    assert asked == [*sizes, 3, 3, 2]
    assert predictions(tmp_path) == whole


def test_an_interrupted_run_keeps_what_it_has(loaded, tasks, tmp_path, monkeypatch):
    original, calls = answering.generate, []

    def stop(*arguments):
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return original(*arguments)

    monkeypatch.setattr(answering, "generate", stop)
    with pytest.raises(KeyboardInterrupt):
        compare(*loaded, SETTINGS, tasks, tmp_path, BRISK)
    lines = {name: text.count("\n") for name, text in predictions(tmp_path).items()}
    assert lines == {"full__1.jsonl": QUESTIONS, "autoprune__1-4.jsonl": 3}
    rows = compare(*loaded, SETTINGS, tasks, tmp_path, BRISK)
    assert all(row["questions"] == QUESTIONS for row in rows)


OWN_METHOD = """
from dataclasses import dataclass
from typing import ClassVar
from autoprune.methods.base import PreDecoder

@dataclass(frozen=True)
class Own(PreDecoder):
    name: ClassVar[str] = "own"
    paper: ClassVar[str] = "none"

    def score(self, seen, state):
        return SIGN * seen.index.float()
"""


def test_a_folder_knows_the_code_of_a_method(loaded, tasks, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)

    def run(sign):
        path = tmp_path / "own_method.py"
        path.write_text(OWN_METHOD.replace("SIGN", sign))
        sys.modules.pop("own_method", None)
        importlib.invalidate_caches()
        linecache.checkcache(str(path))
        method = importlib.import_module("own_method").Own(Budget.tokens(4))
        return compare(*loaded, [Setting("own", "4", method)], tasks[:2], tmp_path / "run", BRISK)

    first = run("(-1)")
    assert run("(-1)") == first
    with pytest.raises(ValueError, match=r"another comparison: code of own was \w+ and is \w+;"):
        run("(1.0)")


def test_another_comparison_in_the_same_folder_is_refused(finished, loaded, tasks):
    _, folder = finished
    before = predictions(folder)
    for settings, chosen, options, message in (
        (SETTINGS, tasks[:-1], BRISK, "tasks count was 4 and is 3"),
        (SETTINGS[:-1], tasks, BRISK, "setting random at 8 is left out"),
        (SETTINGS, tasks, Options(batch_size=2), "batch_size was 3 and is 2"),
    ):
        with pytest.raises(ValueError, match=message):
            compare(*loaded, settings, chosen, folder, options)
    other = torch.nn.Parameter(torch.zeros(1))
    loaded[0].register_parameter("extra", other)
    try:
        with pytest.raises(ValueError, match="model digest was"):
            compare(*loaded, SETTINGS, tasks, folder, BRISK)
    finally:
        del loaded[0].extra
    assert predictions(folder) == before


def test_a_folder_with_other_files_is_left_alone(loaded, tasks, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match="holds other files"):
        compare(*loaded, SETTINGS, tasks, tmp_path, BRISK)
    with pytest.raises(ValueError, match="is a file"):
        compare(*loaded, SETTINGS, tasks, tmp_path / "mine.txt", BRISK)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_what_cannot_run_is_a_row_with_its_reason(loaded, tasks, tmp_path):
    settings = [
        Setting("autoprune", "8", AutoPrune(8)),
        Setting("deep", "1/4", AutoPrune(Budget.ratio(1 / 4), mi_layer=40)),
        Setting("none", "1/4", None, "it takes no such budget"),
        SETTINGS[2],
    ]
    _, small, deep, none, last = compare(*loaded, settings, tasks, tmp_path, BRISK)
    assert small["status"] == deep["status"] == none["status"] == "infeasible"
    assert "smallest feasible budget here is Budget.tokens(9.9375)" in small["reason"]
    assert "mi_layer is 40" in deep["reason"]
    assert none["reason"] == "it takes no such budget"
    assert (last["status"], last["accuracy"] is None) == ("ok", False)
    assert small["accuracy"] is None
    assert "deep at 1/4: mi_layer is 40" in (tmp_path / "report.md").read_text()


def test_a_model_in_training_mode_cannot_be_compared(loaded, tasks, tmp_path):
    model, processor = loaded
    model.train()
    try:
        with pytest.raises(UnsupportedError, match="eval"):
            compare(model, processor, SETTINGS, tasks, tmp_path, BRISK)
    finally:
        model.eval()


@pytest.mark.parametrize(
    ("settings", "options", "message"),
    [
        ([], BRISK, "nothing to compare"),
        ([*SETTINGS, Setting("Random", "8", None)], BRISK, "a label of its own"),
        ([*SETTINGS, Setting("full", "8", None)], BRISK, "'full' is the unpruned model"),
        ([*SETTINGS, Setting("", "8", None)], BRISK, "labelled ''"),
        (SETTINGS, Options(baseline="fastv"), "choose one of autoprune, random"),
        (SETTINGS, Options(workers=0), "workers must be at least 1"),
        (SETTINGS, Options(batch_size=0), "batch_size must be at least 1"),
    ],
)
def test_options_that_do_not_fit(loaded, tasks, tmp_path, settings, options, message):
    with pytest.raises(ValueError, match=message):
        compare(*loaded, settings, tasks, tmp_path, options)


def test_two_workers_give_what_one_gives(finished, loaded, tasks, tmp_path):
    rows = compare(
        *loaded, SETTINGS, tasks, tmp_path, Options(batch_size=3, workers=2, timing=False)
    )
    assert [row["accuracy"] for row in rows] == [row["accuracy"] for row in finished[0]]
    assert predictions(tmp_path).keys() == predictions(finished[1]).keys()


def test_the_baseline_is_asked_for_or_else_the_first(loaded, tasks, tmp_path):
    *_, whole = compare(*loaded, SETTINGS[1:], tasks, tmp_path, BRISK)
    assert whole["difference"] == 0
    asked = Options(batch_size=3, timing=False, baseline="random")
    _, first, second, _ = compare(*loaded, SETTINGS, tasks, tmp_path / "other", asked)
    assert second["difference"] == 0
    assert first["difference"] == pytest.approx(first["accuracy"] - second["accuracy"], abs=1e-6)


def test_a_failing_worker_says_what_happened(loaded, tasks, tmp_path, monkeypatch):
    def fail(*arguments):
        raise RuntimeError("out of luck")

    monkeypatch.setattr(answering, "generate", fail)
    with pytest.raises(RuntimeError, match="out of luck"):
        compare(*loaded, SETTINGS, tasks, tmp_path, Options(workers=2))


def test_what_a_worker_cannot_do_is_said_as_without_workers(loaded, tasks, tmp_path, monkeypatch):
    def fail(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(answering, "generate", fail)
    for workers in (1, 2):
        with pytest.raises(OSError, match="No space left") as raised:
            compare(*loaded, SETTINGS, tasks, tmp_path, Options(workers=workers))
        assert raised.value.errno == 28


def test_a_killed_worker_ends_the_comparison_which_can_be_continued(
    loaded, tasks, tmp_path, monkeypatch
):
    original = answering.generate

    def die(model, processor, method, *rest):
        if method.name == "random":
            os.kill(os.getpid(), signal.SIGKILL)
        return original(model, processor, method, *rest)

    options = Options(batch_size=3, workers=2, timing=False)
    monkeypatch.setattr(answering, "generate", die)
    with pytest.raises(ChildProcessError, match=r"a worker was killed.*continues"):
        compare(*loaded, SETTINGS, tasks, tmp_path, options)
    monkeypatch.setattr(answering, "generate", original)
    rows = compare(*loaded, SETTINGS, tasks, tmp_path, options)
    assert all(row["questions"] == QUESTIONS for row in rows)


def test_workers_end_when_nobody_listens_any_more(tmp_path):
    def work(setting):
        (tmp_path / str(os.getpid())).touch()
        while True:
            time.sleep(0.05)
            yield 1

    parent = multiprocessing.get_context("fork").Process(
        target=run_all, args=(work, SETTINGS, 2, lambda n: None)
    )
    parent.start()
    patience = time.monotonic() + 60
    while len(list(tmp_path.iterdir())) < 2 and time.monotonic() < patience:
        time.sleep(0.05)
    parent.kill()
    parent.join()
    workers = [int(path.name) for path in tmp_path.iterdir()]
    while any(map(alive, workers)) and time.monotonic() < patience:
        time.sleep(0.05)
    assert len(workers) == 2 and not any(map(alive, workers))


def alive(process: int) -> bool:
    try:
        status = Path(f"/proc/{process}/status").read_text()
    except OSError:
        return False
    return "State:\tZ" not in status


def test_an_error_that_cannot_be_sent_is_told(loaded, tasks, tmp_path, monkeypatch):
    class Stubborn(OSError):
        def __reduce__(self):
            raise TypeError("not me")

    def fail(*arguments):
        raise Stubborn("no such luck")

    monkeypatch.setattr(answering, "generate", fail)
    with pytest.raises(RuntimeError, match="no such luck"):
        compare(*loaded, SETTINGS, tasks, tmp_path, Options(workers=2))


def test_another_picture_is_another_comparison(loaded, tmp_path):
    path = tmp_path / "scene.png"
    tiny.draw_scene(3).image.save(path)
    tasks = [Task("1", "all", "how many rings are there?", ("1",), path)]
    compare(*loaded, SETTINGS[1:2], tasks, tmp_path / "run", BRISK)
    tiny.draw_scene(4).image.save(path)
    with pytest.raises(ValueError, match="holds another comparison: tasks digest"):
        compare(*loaded, SETTINGS[1:2], tasks, tmp_path / "run", BRISK)


@pytest.mark.parametrize("kinds", [["low"], ["micro"], ["hard", "hard_low"]])
def test_kinds_that_results_could_not_tell_apart(loaded, tmp_path, kinds):
    picture = tiny.draw_scene(3).image
    tasks = [Task(kind, kind, "how many rings are there?", ("1",), picture) for kind in kinds]
    with pytest.raises(ValueError, match="would share the column"):
        compare(*loaded, SETTINGS, tasks, tmp_path, BRISK)


def test_prompts_of_a_batch_are_padded_on_the_left(loaded, tmp_path):
    picture = tiny.draw_scene(3).image
    picture.save(tmp_path / "scene.png")
    words = ("what is it?", "is the red ring left of the blue square?")
    tasks = [
        Task(str(i), "all", text, ("no",), tmp_path / "scene.png") for i, text in enumerate(words)
    ]
    (batch,) = prepare(*loaded, tasks, 2)
    mask = batch.inputs()["attention_mask"]
    assert mask[:, -1].all()
    assert not mask[0, 0]
    assert mask[1].all()
    alone = loaded[1](images=picture, text=tiny.prompt(loaded[1], words[0]), return_tensors="pt")
    assert torch.equal(batch.inputs()["input_ids"][0][mask[0].bool()], alone["input_ids"][0])


def test_a_tokenizer_that_cannot_pad_is_asked_one_by_one(tasks):
    model, processor = tiny.load()
    processor.tokenizer.pad_token = None
    assert [len(batch.tasks) for batch in prepare(model, processor, tasks, 3)] == [1] * QUESTIONS


def test_inputs_that_do_not_fit_into_memory_are_prepared_again(loaded, tasks, monkeypatch):
    kept = prepare(*loaded, tasks[:2], 2)[0].inputs
    monkeypatch.setattr("autoprune.evaluation.batches.PREPARED_BYTES", 0)
    again = prepare(*loaded, tasks[:2], 2)[0].inputs
    assert kept() is kept()
    assert again() is not again()
    assert torch.equal(kept()["pixel_values"], again()["pixel_values"])


def test_a_tower_that_merges_runs_for_each_of_its_settings(loaded, tasks):
    settings = [SETTINGS[0], Setting("tome", "1/4", autoprune.create("tome", Budget.ratio(1 / 4)))]
    model, processor = loaded
    batches = prepare(model, processor, tasks[:2], 2, encode=encoder(model, settings))
    blocks, runs = model.get_encoder(modality="image").encoder.layers, []
    handle = blocks[-1].register_forward_pre_hook(lambda _, args: runs.append(args[0].shape[1]))
    for setting in settings:
        list(answering.answers(model, processor, setting, batches, 2))
    handle.remove()
    takes_features = "mm_encoder_outputs" in inspect.signature(model.forward).parameters
    assert len(runs) == (1 if takes_features else 2)
    assert runs[-1] < 1 + 144 // 2


def test_features_computed_once_hold_all_that_the_methods_want_to_see_of_the_tower(loaded, tasks):
    model, processor = loaded
    settings = [
        Setting(name, "1/4", autoprune.create(name, Budget.ratio(1 / 4)))
        for name in ("fastervlm", "visionzip", "hiprune", "pooling")
    ]
    batches = prepare(model, processor, tasks[:2], 2, encode=encoder(model, settings))
    plain = prepare(model, processor, tasks[:2], 2)
    for setting in settings:
        answered, expected = (
            [
                record
                for records in answering.answers(model, processor, setting, some, 2)
                for record in records
            ]
            for some in (batches, plain)
        )
        assert [r["prediction"] for r in answered] == [r["prediction"] for r in expected]


def test_features_computed_once_hold_the_padding_of_a_square_picture_too(loaded):
    model, processor = loaded
    image = tiny.draw_scene(seed=7).image
    text = tiny.prompt(processor, "how many shapes are there?")
    inputs = processor(images=image, text=text, return_tensors="pt")
    inputs["pixel_values"][..., :24, :] = inputs["pixel_values"][..., -24:, :] = 0.25
    method = AutoPruneReference(36)
    encode = encoder(model, [Setting("reference", "36", method), SETTINGS[0]])
    if encode is None:
        pytest.skip("this transformers takes no features in place of pixels")
    kept = []
    for given in (dict(inputs), encode(inputs)):
        with torch.inference_mode(), method(model) as trace:
            model(**given)
        kept.append([layer.tolist() for layer in trace.samples[0].kept])
    assert kept[0] == kept[1]
    # A patch that begins a patch or more outside of the picture is worth nothing.
    assert set(kept[0][1]).isdisjoint([*range(2 * 12), *range(10 * 12, 12 * 12)])
