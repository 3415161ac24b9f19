"""CDPruner against determinants that are really computed."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from autoprune.methods.cdpruner import CDPruner
from autoprune.parts.scorers import text_relevance
from autoprune.parts.selectors import dpp_map
from tests.methods.prompts import choices, cosines, mixed


def relevance(p, sign):
    if not len(p.hidden):
        return np.zeros(0)
    similarity = sign * cosines(p.hidden, p.text).mean(axis=1)
    return (similarity - similarity.min()) / (similarity.max() - similarity.min())


def greedy_determinant(features, quality, count):
    kernel = quality[:, None] * cosines(features, features) * quality
    kept, rest = [], list(range(len(features)))
    for _ in range(count):
        kept.append(max(rest, key=lambda i: log_determinant(kernel, [*kept, i])))
        rest.remove(kept[-1])
    return kept


def log_determinant(kernel, tokens):
    return np.linalg.slogdet(kernel[np.ix_(tokens, tokens)])[1]


@pytest.mark.parametrize("negative", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_each_pick_multiplies_the_determinant_most(seed, negative):
    prompts, counts = mixed(seed)
    # The least relevant token has no gain at all: where everything is kept, it is the last.
    for p, count, (kept, _) in zip(
        prompts, counts, choices(CDPruner(8, negative=negative), prompts, counts), strict=True
    ):
        quality = np.maximum(relevance(p, -1 if negative else 1), 1e-9)
        assert kept == sorted(greedy_determinant(p.hidden, quality, count))


def test_beyond_the_rank_of_the_features_relevance_decides():
    random = np.random.default_rng(1)
    features, quality = random.normal(size=(20, 4)), random.uniform(0.2, 1, size=20)
    first = greedy_determinant(features, quality, 4)
    rest = [i for i in np.argsort(-quality) if i not in first]
    mask = torch.ones(1, 20, dtype=torch.bool)
    for count in (4, 9, 20):
        kept = dpp_map(
            torch.tensor(features)[None], torch.tensor(quality)[None].float(), [count], mask
        )
        assert kept[0].tolist() == sorted(first + rest[: count - 4])


def test_without_text_all_tokens_are_as_relevant():
    hidden, text = torch.randn(2, 5, 8), torch.randn(2, 3, 8)
    text_mask = torch.tensor([[True, True, False], [False, False, False]])
    mask = torch.ones(2, 5, dtype=torch.bool)
    found = text_relevance(hidden, text, text_mask, mask)
    assert found[0].min() == 0 and found[0].max() == 1
    assert found[1].tolist() == [1.0] * 5
