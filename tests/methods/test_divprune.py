"""DivPrune against the greedy solution of the max-min diversity problem, written out."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from autoprune.methods.divprune import DivPrune
from autoprune.parts.selectors import max_min_diversity
from tests.methods.prompts import choices, cosines, mixed


def farthest_points(hidden, count):
    distance = 1 - cosines(hidden, hidden)
    kept, rest = [], list(range(len(hidden)))
    for _ in range(count):
        rivals = kept or rest
        best = max(rest, key=lambda i: min((distance[i, j] for j in rivals if j != i), default=0))
        kept.append(best)
        rest.remove(best)
    return sorted(kept)


@pytest.mark.parametrize("seed", range(5))
def test_each_pick_is_the_token_whose_nearest_pick_is_farthest(seed):
    prompts, counts = mixed(seed)
    for p, count, (kept, states) in zip(
        prompts, counts, choices(DivPrune(8), prompts, counts), strict=True
    ):
        assert kept == farthest_points(p.hidden, count)
        assert states is None


def test_one_of_each_kind_is_kept_before_any_duplicate():
    kinds = np.random.default_rng(0).normal(size=(4, 8)).astype(np.float32)
    hidden = torch.from_numpy(kinds[[0, 0, 1, 1, 1, 2, 0, 3, 2]])[None].bfloat16()
    kept = max_min_diversity(hidden, [4], torch.ones(1, 9, dtype=torch.bool))
    assert sorted(np.array([0, 0, 1, 1, 1, 2, 0, 3, 2])[kept[0]]) == [0, 1, 2, 3]
