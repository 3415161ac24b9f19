"""What the harness and the plugin leave of a run, as far as it is read."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from autoprune.evaluation.harness.runs import Job

TASK = "pope"


def write_results(
    folder: Path,
    right: list[int],
    task: str = TASK,
    said: str = "yes",
    entering: float = 16.0,
    judged: bool = True,
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
        metric = {"question": number} | ({"score": float(value)} if judged else {})
        samples.append({"doc_id": number, "pope_accuracy": metric, "target": "yes"})
        figures = {"entering": entering, "flops": 10.0, "flops_full": 40.0, "seconds": 0.5}
        figures |= {"kv_bytes": 3, "kv_bytes_full": 12, "mutual_information": None}
        costs.append({"task": task, "doc_id": number, "prediction": said, **figures})
    (inner / f"20260101_000000_samples_{task}.jsonl").write_text(
        "".join(json.dumps(sample) + "\n" for sample in samples)
    )
    (folder / "costs.jsonl").write_text("".join(json.dumps(cost) + "\n" for cost in costs))


class Pretended:
    """Stands for `runs.Harness`: its processes write what the harness would, as `does` of a job says."""

    def __init__(self, *given: Any) -> None:
        self.arguments, self.batch_size, self.limit, self.seed, self.include_path = given

    def command(self, job: Job, task: str, folder: Path) -> list[str]:
        body = (
            "import sys; from pathlib import Path; folder = Path(sys.argv[1]); task = sys.argv[2]\n"
        )
        body += "from tests.evaluation.harness_files import write_results\n"
        body += f"open({str(folder.parent / 'called')!r}, 'a').write('x')\n"
        return [sys.executable, "-c", body + job.arguments["does"], str(folder), task]
