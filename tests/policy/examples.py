"""How many random examples a property is tried on."""

from __future__ import annotations

import os

from hypothesis import settings

FACTOR = int(os.environ.get("AUTOPRUNE_EXAMPLES", "1"))


def examples(count: int) -> settings:
    """Hypothesis settings: the same `count` examples in every run.

    AUTOPRUNE_EXAMPLES=20 tries twenty times as many, new ones every time.
    """
    return settings(
        max_examples=count * FACTOR, deadline=None, derandomize=FACTOR == 1, database=None
    )
