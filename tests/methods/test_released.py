"""Settings that come closer to the authors' code: positions, padding and the order of tokens."""

from __future__ import annotations

import numpy as np
import pytest

from autoprune import create
from autoprune.methods import METHODS
from autoprune.methods.base import Planned, TowerScored
from autoprune.methods.prumerge import PruMerge
from autoprune.methods.visionzip import VisionZip
from tests.methods.prompts import choices, mixed, observation, prompt, state

PLANNED = [name for name, method in METHODS.items() if issubclass(method, Planned)]
BY_TOWER = [name for name, method in METHODS.items() if issubclass(method, TowerScored)]


@pytest.mark.parametrize("name", PLANNED)
def test_every_method_has_positions_that_are_checked(name):
    assert create(name, 8, positions="compacted").positions == "compacted"
    with pytest.raises(
        ValueError, match=r"positions must be one of .*'original', 'compacted'.*'new'"
    ):
        create(name, 8, positions="new")


def test_the_settings_as_released_are_options_of_the_method():
    named = {name for name, method in METHODS.items() if method.released}
    assert named == {
        *("pdrop", "sparsevlm", "fastervlm", "vispruner", "visionzip", "prumerge", "hiprune"),
        *("divprune", "cdpruner", "scope", "tome", "turbo", "folder"),
    }
    for name in named:
        method = create(name, 8, **METHODS[name].released)
        assert method != create(name, 8)
        assert method.positions == "compacted"


def selected(method, p, count):
    """What is kept of one prompt of which `count` tokens are to stay, and the states."""
    planned = state([p])
    planned.schedule = [[count] * 32]
    selection = method.select(observation([p]), planned)
    return selection.kept[0].tolist(), selection.states


@pytest.mark.parametrize("name", BY_TOWER)
def test_padding_is_as_good_as_the_picture_where_the_authors_do_not_mask_it(name):
    p = prompt((6, 6), padded_rows=2)
    for values in (p.attention, p.received, p.middle):
        values[:12] += 10  # more attended than anything of the picture
    padding = set(range(12))
    assert not padding & set(selected(create(name, 8), p, 10)[0])
    shown, _ = selected(create(name, 8, mask_padding=False), p, 10)
    assert padding & set(shown)
    if name == "fastervlm":
        best = np.argsort(-p.attention)[:10]
        assert shown == sorted(best.tolist()) and set(shown) <= padding


def test_visionzip_as_released_hands_over_merged_tokens_behind_the_dominant_ones():
    p = prompt((3, 4))
    p.attention[:] = [1, 9, 1, 1, 1, 8, 1, 1, 1, 1, 1, 7]
    options = {"contextual": 0.4, "positions": "compacted"}
    ((kept, states),) = choices(VisionZip(8, **options), [p], [5])
    ((same, moved),) = choices(VisionZip(8, order="released", **options), [p], [5])
    # 5 x .4 = 2 targets: of the other tokens the first and the fifth.
    assert kept == same == [0, 1, 5, 6, 11]
    np.testing.assert_array_equal(moved, states[[1, 2, 4, 0, 3]])
    np.testing.assert_array_equal(moved[:3], p.hidden[[1, 5, 11]])


def test_prumerge_as_released_hands_over_outliers_by_falling_attention():
    p = prompt((3, 4))
    p.attention[:] = [1, 50, 1, 1, 1, 90, 1, 1, 1, 1, 1, 70]
    options = {"neighbours": 0, "positions": "compacted"}
    ((kept, states),) = choices(PruMerge(8, **options), [p], [5])
    ((same, moved),) = choices(PruMerge(8, order="released", **options), [p], [5])
    assert kept == same and {1, 5, 11} < set(kept)
    spaced = sorted(set(kept) - {1, 5, 11})
    np.testing.assert_array_equal(states, p.hidden[kept])
    np.testing.assert_array_equal(moved, p.hidden[[5, 11, 1, *spaced]])


@pytest.mark.parametrize("method", [VisionZip, PruMerge])
def test_the_order_as_released_keeps_the_same_tokens_in_every_batch(method):
    prompts, counts = mixed()
    picture = choices(method(8, positions="compacted"), prompts, counts)
    moved = choices(method(8, positions="compacted", order="released"), prompts, counts)
    for (kept, states), (same, others) in zip(picture, moved, strict=True):
        assert kept == same
        order = lambda rows: rows[np.lexsort(rows.T)] if len(rows) else rows  # noqa: E731
        np.testing.assert_array_equal(order(states), order(others))


@pytest.mark.parametrize("method", [VisionZip, PruMerge])
def test_another_order_needs_compacted_positions(method):
    with pytest.raises(ValueError, match="use positions='compacted'"):
        method(8, order="released")
    with pytest.raises(ValueError, match="order must be one of"):
        method(8, order="random", positions="compacted")
