"""HiPrune against anchors, buffers and registers collected one by one."""

from __future__ import annotations

import numpy as np
import pytest

from autoprune.methods.hiprune import HiPrune
from tests.methods.prompts import choices, mixed, observation, prompt


def anchors_buffers_registers(p, count, alpha):
    anchors = sorted(p.real, key=lambda i: -p.middle[i])[: round(count * alpha / 5)]
    place = {tuple(p.places[i]): i for i in p.real}
    buffers = []
    for number, row, column in p.places[anchors]:
        for down, right in ((1, 0), (-1, 0), (0, 1), (0, -1)):
            buffers.append(place.get((number, row + down, column + right)))
    ranking = sorted(p.real, key=lambda i: -p.received[i])
    buffers = [i for i in ranking if i in buffers]
    rest = [i for i in range(len(p.hidden)) if i not in p.real]
    order = dict.fromkeys(sorted(anchors, key=lambda i: -p.received[i]) + buffers + ranking + rest)
    return sorted(list(order)[:count])


@pytest.mark.parametrize("alpha", [0.1, 0.0, 0.6, 1.0])
@pytest.mark.parametrize("seed", range(4))
def test_anchors_come_with_their_neighbours_and_registers_fill_up(seed, alpha):
    prompts, counts = mixed(seed)
    for p, count, (kept, _) in zip(
        prompts, counts, choices(HiPrune(8, alpha=alpha), prompts, counts), strict=True
    ):
        assert kept == anchors_buffers_registers(p, count, alpha)


def test_neighbours_end_at_the_border_of_the_picture():
    p = prompt((4, 4), (4, 4))
    p.middle[:], p.received[:] = 0.0, np.arange(32)
    p.middle[15] = 1.0  # the last token of the first picture
    ((kept, _),) = choices(HiPrune(8, alpha=1.0), [p], [5])
    assert kept == [11, 14, 15, 30, 31]


def test_where_the_budget_is_short_anchors_come_before_their_neighbours():
    p = prompt((7, 7))
    p.middle[:], p.received[:] = 0.0, np.arange(49)
    p.middle[[8, 12]], p.received[[8, 12]] = 1.0, 0.0
    ((kept, _),) = choices(HiPrune(8, alpha=1.0), [p], [8])
    assert kept == [7, 8, 9, 11, 12, 13, 15, 19], "all but the least attended neighbours"


def test_registers_are_ranked_by_all_queries_and_not_by_the_cls_token():
    p = prompt((3, 4))
    p.attention[:], p.received[:] = np.arange(12), np.arange(12)[::-1]
    p.middle[:] = 0.0
    # Of 4 tokens 4 / 50 are anchors, which is none.
    ((kept, _),) = choices(HiPrune(8), [p], [4])
    assert kept == [0, 1, 2, 3]


def test_25_tokens_are_the_fewest_with_an_anchor():
    p = prompt((7, 7))
    p.received[:], p.middle[:] = np.arange(49), 0.0
    p.middle[0] = 1.0
    kept = [choices(HiPrune(8), [p], [count])[0][0] for count in (24, 25, 26)]
    assert kept[0] == list(range(25, 49))
    # 25 / 50 is halfway, and rounds to the even number, as in the official code.
    assert kept[1] == list(range(24, 49))
    assert kept[2] == [0, 1, 7, *range(26, 49)]


def test_the_middle_block_is_a_share_of_the_towers_depth():
    assert HiPrune(8).tower().middle == 9 / 24
    assert HiPrune(8, middle=0.5).tower().middle == 0.5


@pytest.mark.parametrize("options", [{"alpha": -0.1}, {"alpha": 2}, {"middle": 0}, {"middle": 1.1}])
def test_settings_out_of_range_are_refused_and_named(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        HiPrune(8, **options)


@pytest.mark.parametrize("name", ["vision_received", "vision_middle", "places"])
def test_what_the_tower_does_not_give_is_named(name):
    seen = observation([prompt((3, 3))])
    setattr(seen, name, None)
    with pytest.raises(ValueError, match=name.replace("_", " ")):
        HiPrune(8).choose(seen, [4], None)
