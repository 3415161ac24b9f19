"""SCOPE against the coverage of token sets, computed anew for every candidate."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from autoprune.methods.scope import SCOPE
from autoprune.parts.selectors import weighted_coverage
from tests.methods.prompts import choices, cosines, mixed, observation, prompt


def greedy_coverage(p, count, alpha):
    similarity = cosines(p.hidden, p.hidden)
    saliency = np.zeros(len(p.hidden))
    saliency[p.real] = p.attention[p.real].astype(np.float64) ** alpha

    def coverage(tokens):
        return similarity[:, tokens].max(axis=1, initial=0).sum()

    kept, rest = [], list(range(len(p.hidden)))
    for _ in range(count):
        now = coverage(kept)
        best = max(rest, key=lambda j: saliency[j] * (coverage([*kept, j]) - now))
        kept.append(best)
        rest.remove(best)
    return sorted(kept)


@pytest.mark.parametrize("alpha", [1.0, 0.5, 2.0])
@pytest.mark.parametrize("seed", range(3))
def test_each_pick_adds_most_coverage_for_its_saliency(seed, alpha):
    prompts, counts = mixed(seed)
    for p, count, (kept, states) in zip(
        prompts, counts, choices(SCOPE(8, alpha=alpha), prompts, counts), strict=True
    ):
        assert kept == greedy_coverage(p, count, alpha)
        assert states is None


def test_a_token_that_stands_for_many_comes_before_one_more_attended():
    kinds = torch.eye(3)
    hidden = kinds[[0, 0, 0, 1, 1, 2]][None]
    weight = torch.tensor([[0.3, 0.2, 0.2, 0.1, 0.2, 0.5]])
    mask = torch.ones(1, 6, dtype=torch.bool)
    first = [weighted_coverage(hidden, weight, [n], mask)[0].tolist() for n in (1, 2, 3)]
    assert first == [[0], [0, 5], [0, 4, 5]]


def test_what_has_no_attention_is_kept_last():
    p = prompt((3, 5), (4, 4), newlines=True, padded_rows=1)
    ((kept, _),) = choices(SCOPE(8), [p], [len(p.real)])
    assert kept == p.real


@pytest.mark.parametrize("alpha", [0.0, -1.0, float("nan"), float("inf")])
def test_an_exponent_out_of_range_is_refused(alpha):
    with pytest.raises(ValueError, match="alpha"):
        SCOPE(8, alpha=alpha)


def test_a_tower_without_attention_is_named():
    seen = observation([prompt((3, 3))])
    seen.vision_scores = None
    with pytest.raises(ValueError, match="vision tower"):
        SCOPE(8).choose(seen, [4], None)
