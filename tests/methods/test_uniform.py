"""Uniform pruning and average pooling: cells of grids."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch

from autoprune.methods.pooling import Pooling
from autoprune.methods.uniform import Uniform
from autoprune.parts.grid import grid_cells
from tests.methods.prompts import choices, mixed, observation, prompt


@pytest.mark.parametrize(("rows", "columns"), [(24, 24), (12, 12), (6, 8), (4, 2)])
def test_a_quarter_of_a_grid_is_one_token_of_every_two_by_two(rows, columns):
    p, count = prompt((rows, columns)), rows * columns // 4
    ((kept, _),) = choices(Uniform(8), [p], [count])
    assert kept == [r * columns + c for r in range(0, rows, 2) for c in range(0, columns, 2)]
    ((pooled, states),) = choices(Pooling(8), [p], [count])
    assert pooled == kept
    grid = torch.from_numpy(p.hidden).T.reshape(1, -1, rows, columns)
    expected = torch.nn.functional.avg_pool2d(grid, 2)[0].flatten(1).T
    np.testing.assert_allclose(states, expected, atol=1e-6)


@pytest.mark.parametrize("count", [1, 2, 7, 36, 50, 97, 144])
@pytest.mark.parametrize("grids", [[(12, 12)], [(9, 16)], [(16, 9)], [(6, 6), (18, 6)], [(1, 144)]])
def test_cells_are_like_rectangles_shared_out_by_size(grids, count):
    p = prompt(*grids, newlines=True)
    seen = observation([p])
    cell, middle = (found[0].numpy() for found in grid_cells(seen.places, [count], seen.mask))
    placed = ~np.isnan(p.places[:, 0])
    assert (cell[~placed] == -1).all()
    assert sorted(cell[middle]) == list(range(count))
    for number, (rows, columns) in enumerate(grids):
        here = p.places[:, 0] == number
        own = set(cell[here].tolist()) - {-1}
        assert abs(len(own) - Fraction(count * rows * columns, 144)) < 1
        for one in own:
            inside = p.places[here & (cell == one), 1:]
            height, width = (np.ptp(inside[:, axis]) + 1 for axis in (0, 1))
            assert len(inside) == height * width, "a cell has no holes"
            share = rows * columns / len(own)
            assert len(inside) <= 4 * share, "and none is much larger than the others"


def test_pooling_is_the_mean_of_each_cell_and_drops_newlines_first():
    prompts, counts = mixed()
    for p, count, (kept, states) in zip(
        prompts, counts, choices(Pooling(8), prompts, counts), strict=True
    ):
        if not count:
            continue
        seen = observation([p])
        cell = grid_cells(seen.places, [count], seen.mask)[0][0].numpy()
        assert not np.isnan(p.places[kept, 0]).any()
        for token, state in zip(kept, states, strict=True):
            np.testing.assert_allclose(state, p.hidden[cell == cell[token]].mean(axis=0), atol=1e-5)


def test_newlines_stay_where_the_budget_is_larger_than_the_grid():
    p = prompt((3, 3), newlines=True)
    ((kept, states),) = choices(Pooling(8), [p], [11])
    assert kept == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10]
    assert np.array_equal(states, p.hidden[kept])


def test_where_places_are_unknown_tokens_are_spread_over_the_prompt():
    seen = observation([prompt((3, 4)), prompt((2, 4))])
    seen.places = None
    kept = Uniform(8).choose(seen, [4, 3], None).kept
    assert kept.tolist() == [[1, 4, 7, 10], [1, 4, 6, -1]]
