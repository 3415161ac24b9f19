"""Importing the package is cheap, and loading the embedded model is quiet."""

from __future__ import annotations

import logging
import re
import subprocess
import sys
from pathlib import Path

import pytest

import autoprune
from autoprune.quiet_imports import NOISY_IMPORTS, quiet_imports

ROOT = Path(__file__).parents[1]


def output_of(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def test_torch_is_imported_with_the_first_name_that_needs_it():
    code = "import sys, autoprune; print('torch' in sys.modules); autoprune.Budget; "
    code += "print('torch' in sys.modules); autoprune.AutoPrune; print('torch' in sys.modules)"
    assert output_of(code).split() == ["False", "False", "True"]


def test_public_names_and_modules_are_found():
    assert set(autoprune.__all__) <= set(dir(autoprune))
    for name in autoprune.__all__:
        assert getattr(autoprune, name).__module__.startswith("autoprune.")
    assert output_of("import autoprune; print(autoprune.trace.WAITING)") == "16\n"
    with pytest.raises(AttributeError, match="module 'autoprune' has no attribute 'Autoprune'"):
        autoprune.Autoprune  # noqa: B018


def test_loading_the_embedded_model_logs_nothing_and_leaves_the_loggers_alone():
    code = "from autoprune import tiny; tiny.load(); import logging; "
    code += f"print([logging.getLogger(name).level for name in {NOISY_IMPORTS}])"
    printed = output_of(code)
    assert "[0, 0]" in printed
    assert "Failed to load" not in printed and "_pytree.py" not in printed


def test_loggers_get_back_the_level_that_was_theirs():
    logger = logging.getLogger(NOISY_IMPORTS[0])
    logger.setLevel(logging.DEBUG)
    with quiet_imports():
        assert not logger.isEnabledFor(logging.WARNING) and logger.isEnabledFor(logging.ERROR)
    with pytest.raises(KeyError), quiet_imports():
        raise KeyError
    assert logger.level == logging.DEBUG
    logger.setLevel(logging.NOTSET)


def test_every_extra_brings_what_something_needs():
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    section = text.partition("[project.optional-dependencies]\n")[2].partition("\n[")[0]
    assert re.findall(r"^(\w+) = ", section, re.MULTILINE) == [
        "demo",
        "tune",
        "eval",
        "ray",
        "serve",
        "web",
        "dev",
    ]
