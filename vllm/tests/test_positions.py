"""Positions of shortened prompts, against those of whole prompts counted one by one."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from autoprune_vllm.positions import (
    Picture,
    place_tokens,
    waiting_positions,
    with_places,
    without_places,
)

# A prompt: runs of text and pictures (rows, columns, which tokens stay, whether numbered in one row).
pictures = st.tuples(st.integers(1, 4), st.integers(1, 4)).flatmap(
    lambda grid: st.tuples(
        st.just(grid),
        st.sets(st.integers(0, grid[0] * grid[1] - 1), min_size=1).map(sorted),
        st.booleans(),
    )
)
prompts = st.lists(st.one_of(st.integers(1, 5), pictures), min_size=1, max_size=6).map(
    lambda runs: [*runs, 2]
)


def counted(runs):
    """By hand: positions of all tokens, where pictures begin and what they keep, and the next position."""
    now, positions, shapes = 0, [], []
    for run in runs:
        if isinstance(run, int):
            positions += [(now + i,) * 3 for i in range(run)]
            now += run
            continue
        (rows, columns), kept, plain = run
        begins = len(positions)
        places = [(t,) * 3 if plain else (0, t // columns, t % columns) for t in kept]
        positions += [tuple(now + step for step in place) for place in places]
        room = rows * columns if plain else max(rows, columns)
        shapes.append((begins, places, room))
        now += room
    return torch.tensor(positions).T, shapes, now


@given(prompts, st.data())
def test_every_token_stands_where_it_stood(runs, data):
    want, shapes, end = counted(runs)
    length = want.shape[1]
    held = [Picture(begin + torch.arange(len(places)), room) for begin, places, room in shapes]
    positions, delta = waiting_positions(length, held)
    assert delta == end - length
    # In parts of any size, and some of them twice, as after a preemption.
    rows = [(begin + i, place) for begin, places, _ in shapes for i, place in enumerate(places)]
    while rows:
        size = data.draw(st.integers(1, len(rows)))
        part, again = rows[:size], data.draw(st.booleans())
        where, places = torch.tensor([w for w, _ in part]), torch.tensor([p for _, p in part])
        positions = place_tokens(positions, where, places)
        if again:
            positions = place_tokens(positions, where, places)
        rows = rows[size:]
    assert torch.equal(positions, want)


def test_a_part_that_is_not_encoded_leaves_no_position_that_could_be_used():
    """What stands in the prefix cache is not encoded again, and text behind it does not depend on it."""
    positions, delta = waiting_positions(6, [Picture(torch.tensor([1, 2, 3]), 9)])
    assert positions[0].tolist() == [0, -2, -2, -2, 10, 11]
    assert delta == 6
    placed = place_tokens(positions, torch.tensor([3]), torch.tensor([[7, 7, 7]]))
    assert placed[0].tolist() == [0, -2, -2, 8, 10, 11]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_places_survive_every_dtype(dtype):
    places = torch.tensor([[0, 0, 0], [1, 255, 256], [257, 4095, 65279], [0, 12345, 576]])
    embeddings = torch.randn(4, 8).to(dtype)
    back, found = without_places(with_places(embeddings, places))
    assert torch.equal(found, places)
    assert torch.equal(back, embeddings)
