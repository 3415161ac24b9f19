"""A local data set in POPE's format, scored by the harness's own code for POPE."""

from __future__ import annotations

import io
from pathlib import Path

TASK = "pope_of_shapes"


def write_pope(folder: Path, count: int = 12) -> None:
    """Questions of the embedded model that are answered by yes or no, and a task that includes pope.yaml."""
    import datasets
    import lmms_eval.tasks

    from autoprune.evaluation import embedded_tasks

    def png(image: object) -> bytes:
        file = io.BytesIO()
        image.save(file, "PNG")
        return file.getvalue()

    tasks = embedded_tasks(count, ["exists"])
    rows = {
        "question_id": [task.id for task in tasks],
        "question": [task.question for task in tasks],
        "answer": [task.answers[0] for task in tasks],
        "image": [{"bytes": png(task.image), "path": None} for task in tasks],
    }
    text = datasets.Value("string")
    features = datasets.Features(
        question_id=text, question=text, answer=text, image=datasets.Image()
    )
    data = folder / "pope.parquet"
    datasets.Dataset.from_dict(rows, features=features).to_parquet(str(data))
    installed = Path(lmms_eval.tasks.__file__).parent / "pope" / "pope.yaml"
    (folder / f"{TASK}.yaml").write_text(
        f"include: {installed}\n"
        f"task: {TASK}\n"
        "dataset_path: parquet\n"
        f"dataset_kwargs:\n  data_files:\n    test: {data}\n"
        # The embedded model knows questions, and no instructions.
        'lmms_eval_specific_kwargs:\n  default:\n    pre_prompt: ""\n    post_prompt: ""\n'
    )
