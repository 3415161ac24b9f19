"""VisPruner against its rounds of matching, on lists."""

from __future__ import annotations

import pytest

from autoprune.methods.vispruner import VisPruner
from tests.methods.prompts import choices, cosines, mixed, observation, prompt


def attended_and_distinct(p, count, ratio):
    similarity = cosines(p.hidden, p.hidden)
    ranking = sorted(p.real, key=lambda i: -p.attention[i])
    important, others = ranking[: int(count * ratio)], ranking[int(count * ratio) :]
    goal = max(count - len(important), 0)
    while len(others) > goal and len(others) > 1:
        first, second = others[::2], others[1::2]
        first.sort(key=lambda i: -max(similarity[i, j] for j in second))
        remove = min(8, len(others) - goal, len(others) // 2)
        others = first[remove:] + second
    rest = [i for i in range(len(p.hidden)) if i not in p.real]
    return sorted((important + others + rest)[:count])


@pytest.mark.parametrize("ratio", [0.5, 0.0, 0.3, 1.0])
@pytest.mark.parametrize("seed", range(3))
def test_half_is_attended_and_the_rest_resembles_nothing_else(seed, ratio):
    prompts, counts = mixed(seed)
    for p, count, (kept, _) in zip(
        prompts, counts, choices(VisPruner(8, ratio=ratio), prompts, counts), strict=True
    ):
        assert kept == attended_and_distinct(p, count, ratio)


@pytest.mark.parametrize(("side", "count"), [(16, 32), (4, 2), (3, 1)])
def test_a_large_picture_takes_many_rounds_and_a_small_one_smaller_rounds(side, count):
    p = prompt((side, side), seed=3)
    ((kept, _),) = choices(VisPruner(8), [p], [count])
    assert kept == attended_and_distinct(p, count, 0.5)


@pytest.mark.parametrize("ratio", [-0.1, 1.5, float("nan")])
def test_a_ratio_out_of_range_is_refused(ratio):
    with pytest.raises(ValueError, match="ratio"):
        VisPruner(8, ratio=ratio)


def test_a_tower_without_attention_is_named():
    seen = observation([prompt((3, 3))])
    seen.vision_scores = None
    with pytest.raises(ValueError, match="vision_scores"):
        VisPruner(8).choose(seen, [4], None)
