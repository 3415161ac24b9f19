"""ToMe, Turbo and FOLDER against rounds of matching on lists of groups."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from autoprune.contract import Patches
from autoprune.methods.folder import Folder
from autoprune.methods.tome import ToMe
from autoprune.methods.turbo import Turbo
from autoprune.parts.mergers import absorb
from tests.methods.prompts import choices, cosines, mixed, observation, prompt, state


def matched(p, count, rounds, alpha=0.0, groups=None, has_cls=True):
    """For each token that stands for a group: the group."""
    merged_before = groups is not None
    groups = groups if merged_before else {i: [i] for i in p.real}
    mean = p.attention[p.real].mean() if p.real else 1
    while len(groups) > count:
        excess, size = len(groups) - count, len(groups)
        leaving = min(-(-excess // max(rounds, 1)), size // 2)
        rounds -= 1
        order = sorted(groups)
        # With the CLS token in front, every second token looks for one of the others.
        tokens = ["cls", *order] if has_cls else order
        first, second = ([t for t in tokens[i::2] if t != "cls"] for i in (0, 1))
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
        (Folder(8), 1, 0.17),
        (Folder(8, alpha=0), 1, 0),
        (Turbo(8), 24, 0.87),
        (Turbo(8, rounds=5, alpha=2.0), 5, 2.0),
    ],
    ids=str,
)
@pytest.mark.parametrize(("seed", "has_cls"), [(0, True), (1, True), (2, False)])
def test_the_most_similar_pairs_become_their_mean(seed, has_cls, method, rounds, alpha):
    prompts, counts = mixed(seed)
    found = choices(method, prompts, counts, has_cls)
    for p, count, (kept, states) in zip(prompts, counts, found, strict=True):
        groups = matched(p, count, rounds, alpha, has_cls=has_cls)
        assert kept == list(groups)
        if count:
            means = [p.hidden[group].mean(axis=0) for group in groups.values()]
            np.testing.assert_allclose(states, means, atol=1e-5)


@pytest.mark.parametrize(("method", "alpha"), [(ToMe(8), 0), (Turbo(8), 0.87)], ids=str)
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
    selection = method.choose(seen, [count], state([p]))
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
    attended = [5, 19, 25]
    p.attention[attended] = 0.5
    ((without, _),) = choices(ToMe(8), [p], [12])
    ((kept, _),) = choices(Turbo(8), [p], [12])
    assert set(attended) <= set(kept)
    assert not set(attended) & set(without)


def four_tokens(*similar):
    """A row of four tokens, pairs of them in the same direction."""
    p = prompt((1, 4))
    p.keys[:] = np.eye(16)[[0, 1, 2, 3]]
    for one, other in similar:
        p.keys[one] = p.keys[other]
    return p


@pytest.mark.parametrize(("has_cls", "kept"), [(True, [0, 2, 3]), (False, [1, 2, 3])])
def test_a_cls_token_counts_as_the_first_source(has_cls, kept):
    # ToMe splits CLS, 0, 1, 2, 3 into the sources CLS, 1, 3 and the targets 0, 2: here 1 joins 0.
    # Without CLS the sources are 0, 2 and the targets 1, 3: 0 joins 1.
    p = four_tokens((0, 1))
    ((found, states),) = choices(ToMe(8), [p], [3], has_cls)
    assert found == kept
    mean = (p.hidden[0] + p.hidden[1]) / 2
    np.testing.assert_allclose(states[0], mean, atol=1e-6)


@pytest.mark.parametrize(
    ("has_cls", "joins"),
    [(True, [[0, 0, 2, 2], [0, 0, 2, 3]]), (False, [[1, 1, 3, 3], [1, 1, 2, 3]])],
)
def test_the_tower_splits_behind_its_cls_token_too(has_cls, joins):
    keys = torch.tensor([[1.0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 1, 0.5]])[None]
    seen = Patches(keys, torch.ones(1, 4), lambda: torch.ones(1, 4), has_cls)
    for leaving, into in zip((2, 1), joins, strict=True):
        assert ToMe(8).merge(seen, leaving).tolist() == [into]


def test_turbo_takes_500_times_attention_off_the_similarity_of_576_patches():
    p = prompt((24, 24))
    p.attention /= p.attention.sum()
    seen = observation([p])
    worth = Turbo(8).worth(lambda: seen.vision_scores, torch.ones(1, 576))
    np.testing.assert_allclose(worth[0], 500 * p.attention, rtol=0.003)
    worth = Folder(8).worth(lambda: seen.vision_scores, torch.ones(1, 576))
    np.testing.assert_allclose(worth[0], 100 * p.attention, rtol=0.03)


@pytest.mark.parametrize(
    ("attention", "kept"),
    # By similarity 1 joins 0 and 3 stays. Attention of 4 mean ones takes 4 x .17 = .68 off, so that
    # 3 goes: its similarity to 2 is .8.
    [([1, 1, 1, 1], [0, 2, 3]), ([0, 4, 0, 0], [0, 1, 2])],
)
def test_folder_merges_the_less_attended_of_two_similar_tokens(attention, kept):
    p = four_tokens((0, 1))
    p.keys[3] = 0.8 * np.eye(16)[2] + 0.6 * np.eye(16)[3]
    p.attention[:] = attention
    ((found, _),) = choices(Folder(8), [p], [3])
    assert found == kept
    ((found, _),) = choices(Folder(8, alpha=0), [p], [3])
    assert found == [0, 2, 3]


def test_folder_merges_none_of_the_most_attended_tokens_into_another():
    p = prompt((24, 24))
    p.attention = np.random.default_rng(1).pareto(1.5, 576).astype(np.float32) + 0.1
    attended = set(np.argsort(-p.attention)[:96].tolist())
    lost = {}
    for alpha in (0.17, 0.0):
        # 192 of the 288 tokens that can leave do.
        ((kept, _),) = choices(Folder(8, alpha=alpha), [p], [384])
        lost[alpha] = len(attended - set(kept))
    assert lost[0.17] == 0
    assert 26 <= lost[0.0] <= 36


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
