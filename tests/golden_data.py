"""Where the golden data of the released code lies: a subset in the repository, the whole set if it
is at hand.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

COMMITTED = Path(__file__).parent / "golden"


def golden_root() -> list[Path]:
    """Folders with golden data, the committed subset first.

    The whole set is looked for where the environment variable AUTOPRUNE_GOLDEN points, and in
    `shared/golden` beside the repository.
    """
    repository = Path(__file__).resolve().parents[1]
    candidates = [COMMITTED, repository.parent / "shared" / "golden"]
    if os.environ.get("AUTOPRUNE_GOLDEN"):
        candidates.insert(1, Path(os.environ["AUTOPRUNE_GOLDEN"]))
    return [path for path in dict.fromkeys(candidates) if path.is_dir()]


def golden_functions(name: str) -> list[dict[str, Any]]:
    """Entries of `functions/<name>.json`, from the largest set there is.

    Raises:
        FileNotFoundError: not even the committed subset holds the file.
    """
    sets = [
        json.loads(path.read_text())
        for root in golden_root()
        if (path := root / "functions" / f"{name}.json").is_file()
    ]
    if not sets:
        raise FileNotFoundError(
            f"no golden data for {name!r} under {[str(root) for root in golden_root()]}"
        )
    return max(sets, key=len)
