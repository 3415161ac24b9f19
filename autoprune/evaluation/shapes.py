"""The embedded model's questions as a data set: parquet with pictures, and a task of lmms-eval."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path

from ..files import make_folder, write_whole
from .tasks import Task, embedded_tasks

TASK = "autoprune_shapes"
"""How lmms-eval calls it."""
_FILES = Path(__file__).parent / "harness" / "tasks" / "shapes"
_PARQUET = "shapes.parquet"


def export_shapes(
    folder: Path, per_kind: int, kinds: Sequence[str] | None = None, seed: int = 0
) -> Path:
    """Write the questions as shapes.parquet, and the task that asks them, for `lmms-eval --include_path`.

    `datasets.load_dataset("parquet", data_files=...)` reads the file: columns id, kind, question, answer
    and image, whose bytes are in it.

    Args:
        per_kind, kinds, seed: as for `embedded_tasks`.

    Returns:
        The parquet file.

    Raises:
        ValueError: an unknown kind, less than one question, or a folder that cannot be written.
        ImportError: datasets is not installed.
    """
    try:
        import datasets
    except ImportError as error:
        raise ImportError("the export needs datasets: pip install 'autoprune[eval]'") from error
    tasks = embedded_tasks(per_kind, kinds, seed)
    path = make_folder(folder) / _PARQUET
    columns = {
        "id": [task.id for task in tasks],
        "kind": [task.kind for task in tasks],
        "question": [task.question for task in tasks],
        "answer": [task.answers[0] for task in tasks],
        "image": [{"bytes": _png(task), "path": None} for task in tasks],
    }
    features = {name: datasets.Value("string") for name in columns}
    table = datasets.Dataset.from_dict(
        columns, features=datasets.Features({**features, "image": datasets.Image()})
    )
    whole = io.BytesIO()
    table.to_parquet(whole)
    write_whole(path, whole.getvalue())
    text = (_FILES / f"{TASK}.yaml").read_text(encoding="utf-8")
    # The harness looks for files from where it is called. JSON is YAML, too.
    place = json.dumps(str(path.absolute()))
    write_whole(folder / f"{TASK}.yaml", text.replace(f"test: {_PARQUET}", f"test: {place}"))
    write_whole(folder / "utils.py", (_FILES / "utils.py").read_bytes())
    return path


def _png(task: Task) -> bytes:
    file = io.BytesIO()
    assert not isinstance(task.image, Path)
    task.image.save(file, "PNG")
    return file.getvalue()
