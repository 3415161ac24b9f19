"""What the harness and the plugin leave of a run, as far as it is read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

TASK = "pope"


def write_results(
    folder: Path,
    right: list[int],
    task: str = TASK,
    said: str = "yes",
    entering: float = 16.0,
    **changes: Any,
) -> None:
    """What the harness and the plugin leave of a task with so many questions."""
    inner = folder / "model"
    inner.mkdir(parents=True, exist_ok=True)
    score = sum(right) / len(right)
    results = {
        "results": {
            task: {
                "alias": task,
                "pope_accuracy,none": score,
                "pope_accuracy_stderr,none": "N/A",
                "pope_f1_score,none": score / 2,
            }
        },
        "n-samples": {task: {"original": 9, "effective": len(right)}},
        "lmms_eval_version": "0",
        **changes,
    }
    (inner / "20260101_000000_results.json").write_text(json.dumps(results))
    samples, costs = [], []
    for number, value in enumerate(right):
        metric = {"score": float(value), "prediction": said, "ground_truth": "yes"}
        samples.append({"doc_id": number, "pope_accuracy": metric, "target": "yes"})
        figures = {"entering": entering, "flops": 10.0, "flops_full": 40.0, "seconds": 0.5}
        figures |= {"kv_bytes": 3, "kv_bytes_full": 12, "mutual_information": None}
        costs.append({"task": task, "doc_id": number, "prediction": said, **figures})
    (inner / f"20260101_000000_samples_{task}.jsonl").write_text(
        "".join(json.dumps(sample) + "\n" for sample in samples)
    )
    (folder / "costs.jsonl").write_text("".join(json.dumps(cost) + "\n" for cost in costs))
