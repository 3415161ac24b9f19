"""In a terminal of 80 characters every table keeps its columns, and no word is cut off."""

from __future__ import annotations

import itertools
import re

import pytest
from rich.console import Console

from autoprune.cli import answering, driving, files, listing, measuring, timing
from autoprune.methods import METHODS

COMMANDS = (answering, driving, files, listing, measuring, timing)


@pytest.fixture
def narrow(call, monkeypatch):
    """`call` in a terminal of 80 characters."""
    for room in COMMANDS:
        monkeypatch.setattr(
            room, "console", lambda: Console(markup=False, highlight=False, width=80)
        )

    def run(*words):
        lines = [line.rstrip() for line in call(*words).out.splitlines()]
        # Paths and the sentences around them may be longer.
        table = [line for line in lines if "/" not in line or "│" in line]
        assert max(map(len, table)) <= 80
        assert "…" not in "\n".join(lines)
        return lines

    return run


def headings(lines):
    """The words of the first row of a table."""
    row = next(line for line in lines if "┃" in line)
    return [word.strip() for word in row.strip("┃").split("┃")]


def test_compare(narrow, tmp_path):
    long = "autoprune:k0=0.8,beta=0.1,gamma=0.25"
    lines = narrow(
        "compare", "--methods", f"{long},random", "--budgets", "1/4", "--questions", 1,
        "--kinds", "colour,shape", "--no-timing", "--workers", 1, "--output", tmp_path / "run",
    )  # fmt: skip
    assert headings(lines) == ["budget", "method", "tokens", "FLOPs", "accuracy", "difference"]
    (first,) = (line for line in lines if "autoprune" in line and "│" in line)
    assert first.startswith("1/4") and len(first.split("│")[1].strip()) > 10


def test_demo(narrow, tmp_path):
    lines = narrow("demo", "--output", tmp_path)
    (heading,) = (line for line in lines if line.startswith("question"))
    assert heading.split()[-2:] == ["FLOPs", "KV"]
    rows = [line for line in lines if re.search(r"-\d\d\.\d%  -\d\d\.\d%$", line)]
    assert len(rows) == 9


def test_families(narrow):
    lines = narrow("families")
    assert headings(lines) == ["family", "model type", "prompts", "vision scores"]
    assert any("llava_next_video" in line and "images, video" in line for line in lines)


@pytest.mark.parametrize("others", ["0.3", "0.3,0.5,0.7,1.0,2.0", "0.2,0.3,0.4,0.5,0.6,0.7,0.8"])
def test_plan(narrow, others):
    words = ("--layers", 8, "--budget", 100, "--mi", 0.1, "--compare-mi", others)
    lines = narrow("plan", *words)
    assert headings(lines)[1].startswith("0.1") and any("┃ layer ┃" in line for line in lines)
    assert any(line.strip("│ ").startswith("mean") for line in lines)


@pytest.mark.parametrize("name", METHODS)
def test_a_methods_explanation_is_filled(narrow, name):
    """Its paragraphs fill the lines, and start anew only where they say something new."""
    lines = narrow("methods", name)
    assert METHODS[name].paper in " ".join(" ".join(lines).split())
    end = next(n for n, line in enumerate(lines) if line.startswith(("Args:", "Paper:")))
    for line, following in itertools.pairwise(lines[:end]):
        if line and following:
            assert len(line) + 1 + len(following.split()[0]) > 80
