"""Engines and checkpoints, each made once. A start of vLLM takes half a minute and more."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

os.environ |= {
    # One process: errors show where they happen, and tests reach the model.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "HF_HUB_OFFLINE": "1",
}

Start = Callable[..., Any]


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The random checkpoint of a family, by its name."""
    from checkpoints import build

    made: dict[str, Path] = {}

    def get(family: str) -> Path:
        if family not in made:
            made[family] = build(family, tmp_path_factory.mktemp(family))
        return made[family]

    return get


@pytest.fixture(scope="module")
def start_engine() -> Iterator[Start]:
    """Starts engines that live as long as the module's tests."""
    from equality import start

    engines: list[Any] = []

    def begin(folder: Path, **options: Any) -> Any:
        engines.append(start(folder, **options))
        return engines[-1]

    yield begin
    engines.clear()
    gc.collect()
