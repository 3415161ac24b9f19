"""ToMe, Turbo and FOLDER against rounds of matching on lists of groups."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from autoprune.mergers import absorb
from autoprune.methods.folder import Folder
from autoprune.methods.tome import ToMe
from autoprune.methods.turbo import Turbo
from tests.methods.prompts import choices, cosines, mixed, observation, prompt


def matched(p, count, rounds, alpha=0.0, groups=None):
    """For each token that stands for a group: the group."""
    merged_before = groups is not None
    groups = groups if merged_before else {i: [i] for i in p.real}
    mean = p.attention[p.real].mean() if p.real else 1
    while len(groups) > count:
        excess, size = len(groups) - count, len(groups)
        leaving = min(-(-excess // max(rounds, 1)), size // 2)
        rounds -= 1
        order = sorted(groups)
        first, second = order[::2], order[1::2]
        features = {i: p.keys[groups[i]].mean(axis=0) for i in order}
        similarity = cosines(
            np.array([features[i] for i in first]), np.array([features[i] for i in second])
        )
        worth = np.array([alpha * p.attention[groups[i]].mean() / mean for i in first])
        score = similarity.max(axis=1) - worth
        for index in np.argsort(-score)[:leaving]:
            groups[second[similarity[index].argmax()]] += groups.pop(first[index])
    for i in range(len(p.hidden)):
        if not merged_before and len(groups) < count and i not in p.real:
            groups[i] = [i]
    return dict(sorted(groups.items()))


@pytest.mark.parametrize(
    ("method", "rounds", "alpha"),
    [
        (ToMe(8), 24, 0),
        (ToMe(8, rounds=3), 3, 0),
        (Folder(8), 1, 0),
        (Turbo(8), 24, 0.26),
        (Turbo(8, rounds=5, alpha=2.0), 5, 2.0),
    ],
    ids=str,
)
@pytest.mark.parametrize("seed", range(3))
def test_the_most_similar_pairs_become_their_mean(seed, method, rounds, alpha):
    prompts, counts = mixed(seed)
    found = choices(method, prompts, counts)
    for p, count, (kept, states) in zip(prompts, counts, found, strict=True):
        groups = matched(p, count, rounds, alpha)
        assert kept == list(groups)
        if count:
            means = [p.hidden[group].mean(axis=0) for group in groups.values()]
            np.testing.assert_allclose(states, means, atol=1e-5)


@pytest.mark.parametrize(("method", "alpha"), [(ToMe(8), 0), (Turbo(8), 0.26)], ids=str)
@pytest.mark.parametrize("count", [7, 14, 30])
def test_groups_of_the_tower_are_merged_further_or_divided(method, alpha, count):
    p = prompt((3, 5), (5, 5), newlines=True, seed=1)
    numbers = np.random.default_rng(0).integers(14, size=len(p.hidden)).astype(np.float32)
    numbers[[i for i in range(len(numbers)) if i not in p.real]] = np.nan
    groups = {}
    for i in p.real:
        groups.setdefault(numbers[i], []).append(i)
    for group in groups.values():
        for values in (p.hidden, p.keys, p.attention):
            values[group] = values[group[0]]
    seen = observation([p])
    seen.vision_groups = torch.from_numpy(numbers)[None]
    selection = method.choose(seen, [count], None)
    assert selection.counts == [count]
    (kept,) = selection.kept.tolist()
    expected = matched(p, count, 1, alpha, {group[0]: group for group in groups.values()})
    if count > len(groups):
        # Tokens of a group are like each other, and newlines still go first.
        assert set(expected) < set(kept) < set(p.real)
        expected = {i: [i] for i in kept}
    assert kept == list(expected)
    means = [p.hidden[group].mean(axis=0) for group in expected.values()]
    np.testing.assert_allclose(selection.states[0], means, atol=1e-5)


@pytest.mark.parametrize("method", [ToMe(1), Folder(1), Turbo(1)], ids=str)
def test_everything_can_become_one_token(method):
    p = prompt((5, 7), (3, 3))
    ((kept, states),) = choices(method, [p], [1])
    assert len(kept) == 1
    np.testing.assert_allclose(states[0], p.hidden.mean(axis=0), atol=1e-5)


def test_what_the_tower_attends_to_joins_no_other_token():
    p = prompt((6, 6))
    p.attention[:] = 0.001
    attended = [4, 18, 22]
    p.attention[attended] = 0.5
    ((without, _),) = choices(ToMe(8), [p], [12])
    ((kept, _),) = choices(Turbo(8), [p], [12])
    assert set(attended) <= set(kept)
    assert not set(attended) & set(without)


def test_a_token_that_takes_none_in_is_the_same_bit_for_bit():
    hidden = torch.randn(1, 4, 8).bfloat16()
    states = absorb(hidden, torch.tensor([[0, 2]]), torch.tensor([[-1, 2, 2, -1]]))
    assert torch.equal(states[0, 0], hidden[0, 0])
    assert torch.equal(states[0, 1], hidden[0, 1:3].float().mean(dim=0).bfloat16())


@pytest.mark.parametrize(
    ("method", "options"),
    [(ToMe, {"rounds": 0}), (Turbo, {"alpha": -1}), (Turbo, {"alpha": float("inf")})],
)
def test_settings_out_of_range_are_refused_and_named(method, options):
    with pytest.raises(ValueError, match=next(iter(options))):
        method(8, **options)


def test_a_tower_without_keys_is_named():
    seen = observation([prompt((3, 3))])
    seen.vision_keys = None
    with pytest.raises(ValueError, match="vision keys"):
        ToMe(8).choose(seen, [4], None)
