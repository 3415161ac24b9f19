"""PruMerge+ against outliers, a grid and neighbours found one by one."""

from __future__ import annotations

import numpy as np
import pytest

from autoprune.methods.prumerge import PruMerge
from tests.methods.prompts import choices, cosines, mixed, prompt


def outliers_and_grid(p, count, neighbours):
    real = p.real
    low, high = np.percentile(p.attention[real], [25, 75]) if real else (0, 0)
    ranking = sorted(real, key=lambda i: -p.attention[i])
    kept = [i for i in ranking if p.attention[i] > high + 1.5 * (high - low)][:count]
    rest = [i for i in real if i not in kept]
    need = min(count - len(kept), len(rest))
    # One token of every stretch of len(rest) / need tokens.
    spots = [-((len(rest) // 2 - k * len(rest)) // need) for k in range(need + 1) if need]
    kept += [rest[spot] for spot in spots if 0 <= spot < len(rest)]
    dropped = [i for i in real if i not in kept]
    states = {}
    for i in kept:
        nearest = sorted(dropped, key=lambda j: -cosines(p.keys[[i]], p.keys[[j]])[0, 0])
        weights = p.attention[nearest[:neighbours]].astype(np.float64)
        total = p.hidden[i] + weights @ p.hidden[nearest[:neighbours]]
        states[i] = total / (1 + weights.sum())
    for i in range(len(p.hidden)):
        if len(states) < count and i not in real:
            states[i] = p.hidden[i]
    return dict(sorted(states.items()))


@pytest.mark.parametrize("neighbours", [32, 3, 0])
@pytest.mark.parametrize("seed", range(3))
def test_outliers_and_evenly_spaced_tokens_take_in_what_is_near(seed, neighbours):
    prompts, counts = mixed(seed)
    found = choices(PruMerge(8, neighbours=neighbours), prompts, counts)
    for p, count, (kept, states) in zip(prompts, counts, found, strict=True):
        expected = outliers_and_grid(p, count, neighbours)
        assert kept == list(expected)
        if count:
            np.testing.assert_allclose(states, list(expected.values()), atol=1e-5)


def test_more_outliers_than_the_budget_leave_the_most_attended():
    p = prompt((10, 10))
    p.attention[:] = 0.001
    p.attention[40:60] = np.linspace(0.1, 0.2, 20)
    ((kept, _),) = choices(PruMerge(8), [p], [5])
    assert kept == [55, 56, 57, 58, 59]


def test_where_attention_is_flat_the_kept_tokens_are_evenly_spaced():
    p = prompt((10, 10))
    p.attention[:] = 0.01
    ((kept, _),) = choices(PruMerge(8), [p], [20])
    assert set(np.diff(kept)) == {5}


def test_settings_out_of_range_are_refused_and_named():
    with pytest.raises(ValueError, match="neighbours"):
        PruMerge(8, neighbours=-1)
