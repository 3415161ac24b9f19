"""lmms-eval with the plugin scores as this library does, and counts what the answers cost."""

from __future__ import annotations

import json
from importlib.metadata import entry_points
from pathlib import Path

import pytest

from autoprune import AutoPrune, tiny
from autoprune.evaluation import Options, Setting, compare, embedded_tasks
from autoprune.evaluation.harness.costs import read_costs
from autoprune.evaluation.harness.outputs import correctness

from .conftest import BUDGET, PER_KIND, Evaluate
from .pope import TASK

METHOD = f"method=autoprune,budget={BUDGET}"


def test_the_harness_finds_the_plugin_by_its_entry_point():
    (found,) = [
        point for point in entry_points(group="lmms_eval.models") if point.name == "autoprune"
    ]
    (manifest,) = found.load()()
    assert manifest.model_id == "autoprune"
    assert manifest.chat_class_path.endswith("harness.model.AutoPruneChat")


def test_the_harness_and_compare_agree_on_every_question(evaluate: Evaluate, tmp_path: Path):
    costs = tmp_path / "costs.jsonl"
    found = evaluate("autoprune_shapes", f"pretrained=embedded,{METHOD},costs={costs}")
    model, processor = tiny.load()
    tasks = embedded_tasks(PER_KIND)
    settings = [Setting("autoprune", str(BUDGET), AutoPrune(BUDGET))]
    options = Options(batch_size=4, timing=False)
    rows = compare(model, processor, settings, tasks, tmp_path / "own", options)
    lines = (tmp_path / "own" / "predictions" / f"autoprune__{BUDGET}.jsonl").read_text()
    own = {record["id"]: record for record in map(json.loads, lines.splitlines())}
    samples = found["samples"]["autoprune_shapes"]
    assert len(samples) == len(own) == len(tasks)
    paid = read_costs(costs)
    for sample in samples:
        record = own[sample["doc"]["id"]]
        assert sample["filtered_resps"] == [record["prediction"]]
        assert sample["accuracy"] == record["correct"]
        cost = paid["autoprune_shapes", sample["doc_id"]]
        assert cost["entering"] == record["entering"] == BUDGET
        assert cost["flops"] == record["flops"]
        assert cost["kv_bytes"] == record["kv_bytes"]
    score = found["results"]["autoprune_shapes"]["accuracy,none"]
    assert score == pytest.approx(rows[1]["accuracy_micro"], abs=1e-6)


def test_costs_are_among_the_results(evaluate: Evaluate):
    found = evaluate("autoprune_shapes", METHOD, limit=4)
    said = found["throughput"]
    assert said["avg_visual_tokens"] == 144
    assert said["avg_visual_tokens_entering"] == BUDGET
    assert 0.1 < said["avg_prefill_flops_share"] < 0.2
    assert 0.1 < said["avg_kv_bytes_share"] < 0.2
    assert said["total_elapsed_time"] > 0
    for sample in found["samples"]["autoprune_shapes"]:
        (counts,) = sample["token_counts"]
        words = len(sample["doc"]["question"].split())
        # Tokens of the question and of the template, and those of the picture that enter a layer.
        assert counts["input_tokens"] >= words + BUDGET
        assert counts["input_tokens"] < 144
        assert counts["output_tokens"] >= 2


@pytest.mark.parametrize("arguments", [METHOD, "method=full"])
def test_pope_is_scored_by_its_own_code(evaluate: Evaluate, arguments: str):
    found = evaluate(TASK, arguments)
    said = [
        (sample["filtered_resps"][0].strip().lower(), sample["target"])
        for sample in found["samples"][TASK]
    ]
    assert len(said) == 12
    assert {target for _, target in said} == {"yes", "no"}
    hits = sum(answer == target == "yes" for answer, target in said)
    given, right = (
        sum(answer == "yes" for answer, _ in said),
        sum(target == "yes" for _, target in said),
    )
    results = found["results"][TASK]
    assert results["pope_accuracy,none"] == sum(a == t for a, t in said) / len(said)
    assert results["pope_precision,none"] == hits / given
    assert results["pope_recall,none"] == hits / right
    assert results["pope_f1_score,none"] == pytest.approx(2 * hits / (given + right))


def test_the_size_of_a_batch_changes_no_answer(evaluate: Evaluate, tmp_path: Path):
    def answers(size: int) -> dict[int, object]:
        costs = tmp_path / f"{size}.jsonl"
        found = evaluate("autoprune_shapes", f"{METHOD},costs={costs}", batch_size=size)
        samples = found["samples"]["autoprune_shapes"]
        paid = read_costs(costs)
        return {
            own["doc_id"]: (own["filtered_resps"], paid["autoprune_shapes", own["doc_id"]]["flops"])
            for own in samples
        }

    assert answers(1) == answers(4)


def test_an_option_reaches_the_method(evaluate: Evaluate, tmp_path: Path):
    steep, flat = tmp_path / "steep.jsonl", tmp_path / "flat.jsonl"
    evaluate("autoprune_shapes", f"{METHOD},k0=0.9,costs={steep}", limit=2)
    evaluate("autoprune_shapes", f"{METHOD},merger=summary,costs={flat}", limit=2)
    one, other = (read_costs(path)["autoprune_shapes", 0] for path in (steep, flat))
    assert one["entering"] == other["entering"] == BUDGET
    assert one["flops"] != other["flops"]


def test_shapes_load_as_a_data_set(data: Path):
    import datasets

    table = datasets.load_dataset(
        "parquet", data_files={"test": str(data / "shapes.parquet")}, split="test"
    )
    tasks = embedded_tasks(PER_KIND)
    assert [row["question"] for row in table] == [task.question for task in tasks]
    assert [row["answer"] for row in table] == [task.answers[0] for task in tasks]
    first = table[0]["image"]
    assert first.size == tasks[0].image.size
    assert first.tobytes() == tasks[0].image.tobytes()


@pytest.mark.parametrize(
    ("kind", "answer", "read", "right"),
    [
        ("multiple-choice", "B", "B", 1.0),
        ("multiple-choice", "B", "C", 0.0),
        ("open", "3", ["three", 3.0], 1.0),
        ("open", "a ring", ["it is a ring"], 1.0),
        ("open", "['2', '4']", [5.0], 0.0),
    ],
)
def test_mmmu_is_judged_by_its_own_rules(kind: str, answer: str, read: object, right: float):
    said = {"id": "x", "question_type": kind, "answer": answer, "parsed_pred": [read]}
    assert correctness({"doc_id": 0, "mmmu_acc": said, "submission": {"x": "B"}}) == right
