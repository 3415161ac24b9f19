"""What `import autoprune` offers is what docs/api.md lists; its errors reach other processes."""

from __future__ import annotations

import pickle
import re
from pathlib import Path

import pytest

import autoprune
from autoprune import AutoPrune, InfeasibleBudget, UnsupportedError

PAGE = Path(__file__).parents[1] / "docs" / "api.md"


def test_the_page_lists_the_names_of_the_package():
    listed = PAGE.read_text().split("## At a glance")[1].split("\n## ")[0]
    names = re.findall(r"^\| `autoprune\.(\w+)", listed, flags=re.MULTILINE)
    assert sorted(names) == sorted(autoprune.__all__)
    assert all(hasattr(autoprune, name) for name in names)


def test_the_errors_at_the_top_are_those_that_are_raised():
    assert issubclass(InfeasibleBudget, ValueError)
    assert issubclass(UnsupportedError, RuntimeError)
    with pytest.raises(InfeasibleBudget):
        AutoPrune(1).plan(32, 576, 0.5)
    with pytest.raises(autoprune.UnsupportedError, match="not a transformers model"):
        AutoPrune(1)("llava")


def test_an_infeasible_budget_can_be_pickled():
    with pytest.raises(InfeasibleBudget) as caught:
        AutoPrune(1).plan(32, 576, 0.5)
    error = caught.value
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is InfeasibleBudget
    assert str(again) == str(error)
    assert (again.asked, again.smallest) == (error.asked, error.smallest)
    assert again.smallest is not None
