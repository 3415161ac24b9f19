"""DART: pivots, and the tokens that are least like them."""

from __future__ import annotations

import numpy as np
import pytest

from autoprune.methods.dart import DART
from tests.methods.shown import kept_of, shown

COUNTS, ROWS = [30, 11, 18], [6, 2, 9]


def slow_dart(given, count, visual_pivots, text_pivots):
    """One prompt's kept tokens, pivot by pivot."""

    def cosine(a, b):
        return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))

    def by_norm(keys):
        norms = np.abs(keys).sum(axis=(0, 2))
        return sorted(range(len(norms)), key=lambda i: (-norms[i], i))

    hidden, words = given.hidden[0].double().numpy(), given.text_hidden[0].double().numpy()
    pivots = by_norm(given.keys[0].double().numpy())[: min(visual_pivots, count)]
    others = by_norm(given.text_keys[0].double().numpy())[:text_pivots]
    kept, rest = set(pivots), count - len(pivots)
    vectors = [hidden[i] for i in pivots] + [words[i] for i in others]
    for turn, vector in enumerate(vectors):
        share = rest // len(vectors) + (turn < rest % len(vectors))
        left = [i for i in range(len(hidden)) if i not in kept]
        left.sort(key=lambda i: cosine(vector, hidden[i]))
        kept.update(left[:share])
    return sorted(kept)


@pytest.mark.parametrize("pivots", [(4, 4), (2, 5), (0, 3), (3, 0)])
@pytest.mark.parametrize("counts", [[20, 8, 13], [30, 10, 18], [5, 3, 1]])
def test_pivots_take_turns_with_what_is_least_like_them(counts, pivots):
    given = shown(COUNTS, ROWS, seed=sum(pivots))
    method = DART(8, visual_pivots=pivots[0], text_pivots=pivots[1])
    kept = kept_of(method.choose(given.observation(), counts, None))
    for row, count in enumerate(counts):
        assert len(kept[row]) == count
        assert kept[row] == slow_dart(given.alone(row), count, *pivots)


@pytest.mark.parametrize("options", [{"visual_pivots": -1}, {"text_pivots": -2}, {"layer": 0}])
def test_settings_out_of_range_are_refused_and_named(options):
    (name,) = options
    with pytest.raises(ValueError, match=name):
        DART(8, **options)


def test_there_has_to_be_a_pivot():
    with pytest.raises(ValueError, match="both 0"):
        DART(8, visual_pivots=0, text_pivots=0)
