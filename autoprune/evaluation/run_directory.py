"""The folder of a comparison: its configuration, and predictions that a later call can continue."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..files import write_whole
from .batches import Batch
from .settings import Setting

_SHOWN = 5


@dataclass(frozen=True)
class Answers:
    """What one setting answered, question by question; all of the length of `kinds`.

    predictions: the texts. correct: 0 to 1. entering: mean visual tokens entering a layer. flops, kv_bytes:
    of the decoder's prefill. mutual_information: bits, NaN where none was measured.
    """

    kinds: list[str]
    predictions: list[str]
    correct: NDArray[np.float64]
    entering: NDArray[np.float64]
    flops: NDArray[np.float64]
    kv_bytes: NDArray[np.float64]
    mutual_information: NDArray[np.float64]


class RunDirectory:
    """Where a comparison is kept; made if it does not exist.

    Args:
        path: the folder.
        compared: what decides the results; a folder that was made for something else is refused.
        noted: what is written beside it and may change, such as the machine.

    Raises:
        ValueError: the path is a file, or the folder holds another comparison; what differs is named.
    """

    def __init__(self, path: Path, compared: dict[str, Any], noted: dict[str, Any]):
        self.path = path
        claim(path, compared, noted, "comparison")
        (path / "predictions").mkdir(exist_ok=True)

    def predictions(self, setting: Setting) -> Path:
        """The file of a setting's predictions, one JSON object per line."""
        return self.path / "predictions" / f"{setting.name}.jsonl"

    def answered(self, setting: Setting, batches: Sequence[Batch]) -> int:
        """How many batches are answered; what was written beyond is dropped.

        A batch counts as one because a method may treat its prompts together.
        """
        path = self.predictions(setting)
        self._refusal(setting).unlink(missing_ok=True)
        if not path.exists():
            return 0
        lines = path.read_bytes().splitlines(keepends=True)
        if lines and not lines[-1].endswith(b"\n"):
            lines.pop()
        done = kept = 0
        for batch in batches:
            if kept + len(batch.tasks) > len(lines):
                break
            done, kept = done + 1, kept + len(batch.tasks)
        with path.open("r+b") as file:
            file.truncate(sum(map(len, lines[:kept])))
        return done

    def append(self, setting: Setting, records: Sequence[dict[str, Any]]) -> None:
        """Add the predictions of one batch."""
        lines = "".join(json.dumps(record, allow_nan=False) + "\n" for record in records)
        with self.predictions(setting).open("ab") as file:
            file.write(lines.encode())

    def refuse(self, setting: Setting, reason: str) -> None:
        """Note that a setting cannot run."""
        write_whole(self._refusal(setting), reason)

    def refusal(self, setting: Setting) -> str | None:
        """Why a setting could not run; None if it could."""
        path = self._refusal(setting)
        return path.read_text(encoding="utf-8") if path.exists() else None

    def read(self, setting: Setting) -> Answers:
        """All predictions of a setting."""
        kinds, predictions = [], []
        columns: dict[str, list[Any]] = {
            name: [] for name in ("correct", "entering", "flops", "kv_bytes", "mutual_information")
        }
        with self.predictions(setting).open(encoding="utf-8") as lines:
            for line in lines:
                record = json.loads(line)
                kinds.append(record["kind"])
                predictions.append(record["prediction"])
                for name, column in columns.items():
                    column.append(record[name])
        figures = {name: np.array(column, float) for name, column in columns.items()}
        return Answers(kinds, predictions, **figures)

    def _refusal(self, setting: Setting) -> Path:
        return self.path / "predictions" / f"{setting.name}.infeasible"


def claim(
    path: Path,
    decides: dict[str, Any],
    noted: dict[str, Any],
    what: str,
    otherwise: str = "give another folder",
) -> None:
    """Make a folder for results, or take up the one that was made for the same.

    Args:
        decides: what decides the results.
        noted: what is written beside it and may change.
        what: is kept there, for messages: "comparison".
        otherwise: the way out, for messages.

    Raises:
        ValueError: the path is a file, or the folder holds other results; what differs is named.
    """
    if path.exists() and not path.is_dir():
        raise ValueError(f"{str(path)!r} is a file; give a folder for the results")
    config = path / "config.json"
    decides = json.loads(json.dumps(decides))
    if config.is_file():
        _refuse_another(path, _read_config(config, what), decides, what, otherwise)
    elif path.is_dir() and any(path.iterdir()):
        raise ValueError(
            f"{str(path)!r} holds other files and no {what}; give a new or empty folder"
        )
    path.mkdir(parents=True, exist_ok=True)
    write_whole(config, json.dumps({"compared": decides, **noted}, indent=1))


def _read_config(path: Path, what: str) -> dict[str, Any]:
    try:
        compared = json.loads(path.read_text(encoding="utf-8"))["compared"]
        return dict(compared)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{str(path)!r} is not the configuration of a {what}; give another folder"
        ) from error


def _refuse_another(
    path: Path, old: dict[str, Any], new: dict[str, Any], what: str, otherwise: str
) -> None:
    before, after = _flat(old), _flat(new)
    names = dict.fromkeys((*before, *after))
    differing = [name for name in names if before.get(name) != after.get(name)]
    if differing:
        listed = [_difference(name, before, after) for name in differing[:_SHOWN]]
        more = len(differing) - _SHOWN
        raise ValueError(
            f"{str(path)!r} holds another {what}: {'; '.join(listed)}"
            + (f"; and {more} more" if more > 0 else "")
            + f"; {otherwise}, or the settings it was made with"
        )


def _difference(name: str, before: dict[str, Any], after: dict[str, Any]) -> str:
    if name not in before:
        return f"{name} is new"
    if name not in after:
        return f"{name} is left out"
    return f"{name} was {before[name]} and is {after[name]}"


def _flat(config: dict[str, Any]) -> dict[str, Any]:
    flat = {}
    for name, value in config.items():
        inner = value.items() if isinstance(value, dict) else ()
        flat.update({f"{name} {key}": item for key, item in inner} or {name: value})
    return flat
