"""PACT: importance, clusters bounded by distance, and how many of them a budget allows."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from autoprune import Budget
from autoprune.methods.pact import PACT, _centres, clusters, importance
from autoprune.parts.selectors import top_k
from tests import zoo
from tests.methods.shown import HEAD_DIM, HEADS, KEY_HEADS, kept_of, shown

COUNTS, ROWS = [40, 11, 26], [3, 3, 3]
TARGETS = [12, 3, 8]


def slow_importance(keys, queries):
    """Of one prompt: keys [key heads, V, d], queries [heads, V, d]."""
    total = np.zeros(keys.shape[1])
    for head in range(HEADS):
        key = keys[head // (HEADS // KEY_HEADS)]
        weights = np.exp(key @ queries[head].mean(axis=0) / math.sqrt(HEAD_DIM))
        total += weights / weights.sum() / HEADS
    return total


def slow_centres(distance, cutoff):
    """Centres of one prompt, taken one after the other by falling density."""
    density = np.exp(-((distance / 2) ** 2)).sum(axis=1)
    centres = []
    for token in sorted(range(len(density)), key=lambda i: (-density[i], i)):
        if all(distance[token, centre] > cutoff for centre in centres):
            centres.append(token)
    return centres


def survivors_of(given, target, important=0.55):
    """Of one prompt: its vectors' distances, and the tokens that the first step leaves."""
    keys, queries = given.keys[0].double().numpy(), given.queries[0].double().numpy()
    norms = np.linalg.norm(given.hidden[0].double().numpy(), axis=1)
    scores = slow_importance(keys, queries) * norms
    number = max(int(important * len(scores)), target)
    survivors = sorted(np.argsort(-scores)[:number].tolist())
    vectors = keys.transpose(1, 0, 2).reshape(len(scores), -1)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return 1 - vectors @ vectors.T, survivors


def cutoff_of(distance, survivors, centres):
    """A cutoff at which the slow clustering finds just these centres, or None."""
    among = distance[np.ix_(survivors, survivors)]
    edges = np.unique(among)
    for cutoff in [-1, *((edges[1:] + edges[:-1]) / 2), 3]:
        if sorted(survivors[i] for i in slow_centres(among, cutoff)) == centres:
            return cutoff
    return None


def test_importance_is_the_attention_of_the_mean_query():
    given = shown(COUNTS, ROWS)
    seen = given.observation()
    found = importance(given.keys, given.queries, seen.mask)
    for row, count in enumerate(COUNTS):
        one = given.alone(row)
        wanted = slow_importance(one.keys[0].numpy(), one.queries[0].numpy())
        np.testing.assert_allclose(found[row, :count], wanted, rtol=1e-4)


@pytest.mark.parametrize("cutoff", [-0.1, 0.0, 0.4, 0.8, 1.1, 2.1])
def test_centres_are_farther_apart_than_the_cutoff(cutoff):
    vectors = normalize(torch.randn(1, 30, 5, generator=torch.Generator().manual_seed(3)), dim=2)
    distance = (1 - vectors @ vectors.transpose(1, 2)).clamp(min=0)
    order = (-((distance / 2) ** 2)).exp().sum(dim=2).argsort(dim=1, descending=True)[0]
    ordered = distance[:, order][:, :, order]
    found = _centres(ordered, torch.ones(1, 30, dtype=torch.bool), torch.tensor([[cutoff, 9.0]]))
    assert sorted(order[found[0, 0]].tolist()) == sorted(slow_centres(distance[0].numpy(), cutoff))
    assert found[0, 1].sum() == 1


@pytest.mark.parametrize("recover", [0.0, 1.5])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_kept_tokens_are_centres_and_take_the_mean_of_their_cluster(seed, recover):
    given = shown(COUNTS, ROWS, seed)
    selection = PACT(8, recover=recover).choose(given.observation(), TARGETS, None)
    joined = 0
    for row, kept in enumerate(kept_of(selection)):
        one = given.alone(row)
        distance, survivors = survivors_of(one, TARGETS[row])
        cutoff = cutoff_of(distance, survivors, kept)
        assert cutoff is not None, "no cutoff gives these centres"
        members = {centre: [] for centre in kept}
        for token in range(COUNTS[row]):
            nearest = min(kept, key=lambda centre: distance[token, centre])
            if token in survivors:
                members[nearest].append(token)
            elif distance[token, nearest] < recover * cutoff:
                joined += 1
                members[nearest].append(token)
        hidden = one.hidden[0].double()
        for place, centre in enumerate(kept):
            mean = hidden[members[centre]].mean(dim=0).float()
            torch.testing.assert_close(selection.states[row, place], mean, atol=1e-5, rtol=0)
    assert (joined > 0) == (recover > 0)


@pytest.mark.parametrize("seed", range(5))
def test_as_many_clusters_as_the_budget_allows(seed):
    given = shown(COUNTS, ROWS, seed)
    counts = PACT(8).choose(given.observation(), TARGETS, None).counts
    for row, (count, target) in enumerate(zip(counts, TARGETS, strict=True)):
        distance, survivors = survivors_of(given.alone(row), target)
        among = distance[np.ix_(survivors, survivors)]
        possible = [len(slow_centres(among, cutoff)) for cutoff in np.unique(among)]
        assert max(n for n in possible if n <= target) - 1 <= count <= target


def test_a_prompt_gets_in_a_batch_what_it_gets_alone():
    given = shown(COUNTS, ROWS)
    together = PACT(8).choose(given.observation(), TARGETS, None)
    for row, target in enumerate(TARGETS):
        single = PACT(8).choose(given.alone(row).observation(), [target], None)
        assert kept_of(single)[0] == kept_of(together)[row]
        states = together.states[row, : together.counts[row]]
        torch.testing.assert_close(single.states[0], states, atol=1e-6, rtol=0)


def test_a_budget_for_more_than_the_important_tokens_only_drops_the_others():
    given, targets = shown(COUNTS, ROWS), [36, 11, 20]
    seen = given.observation()
    selection = PACT(8, recover=0).choose(seen, targets, None)
    scores = importance(given.keys, given.queries, seen.mask) * given.hidden.norm(dim=2)
    assert selection.counts == targets
    assert torch.equal(selection.kept, top_k(scores, targets, seen.mask))
    for row, kept in enumerate(kept_of(selection)):
        assert torch.equal(selection.states[row, : len(kept)], given.hidden[row, kept])


def test_equal_tokens_make_one_cluster_and_leave_budget_over():
    vectors = normalize(torch.ones(1, 6, 4), dim=2)
    assert clusters(vectors, torch.arange(6)[None], [3], recover=1.5).tolist() == [[0] * 6]


def test_equal_tokens_stay_apart_where_the_budget_keeps_them_all():
    vectors = normalize(torch.ones(1, 6, 4), dim=2)
    assert clusters(vectors, torch.arange(6)[None], [6], recover=1.5).tolist() == [list(range(6))]


def test_without_recovery_not_even_a_dropped_twin_of_a_centre_joins_it():
    generator = torch.Generator().manual_seed(0)
    vectors = normalize(torch.randn(20, 1, 5, generator=generator), dim=2).expand(-1, 6, -1)
    owner = clusters(vectors, torch.arange(3).expand(20, -1), [1] * 20, recover=0)
    assert owner.tolist() == [[0, 0, 0, -1, -1, -1]] * 20


def test_keys_and_queries_are_those_of_the_layer_that_the_cut_stands_before():
    assert PACT(90).plan(32, 100)[3:5] == [100, 88], "layers 0 to 3 see everything"
    model = zoo.build("llava", "sdpa")
    inputs = zoo.inputs("llava", model, "padded3")
    # Layer 16 of 32 is 3 of 6.
    attention, seen, projected = model.get_decoder().layers[3].self_attn, [], {}

    class Watching(PACT):
        def choose(self, shown, counts, state):
            seen.append((shown.cut, shown.keys(), shown.queries(), shown.mask))
            return super().choose(shown, counts, state)

    with torch.no_grad():
        hooks = [
            getattr(attention, name).register_forward_hook(
                lambda _, __, out, name=name: projected.setdefault(name, out)
            )
            for name in ("q_proj", "k_proj")
        ]
        model(**inputs)
        for hook in hooks:
            hook.remove()
        with Watching(Budget.ratio(0.8), layer=16)(model):
            model(**inputs)
    ((cut, keys, queries, mask),) = seen
    assert cut == 3
    visual = zoo.visual_mask(model, inputs["input_ids"])
    for found, name in ((keys, "k_proj"), (queries, "q_proj")):
        for row in range(len(visual)):
            one = found[row][:, mask[row]]  # [heads, V, head dim]
            plain = projected[name][row, visual[row]].unflatten(1, (one.shape[0], -1))
            # A rotation keeps the length.
            lengths = plain.norm(dim=2).T
            torch.testing.assert_close(one.norm(dim=2), lengths, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "options",
    [{"important": 0}, {"important": 1.2}, {"recover": -1}, {"recover": math.inf}, {"layer": 32}],
)
def test_settings_out_of_range_are_refused_and_named(options):
    (name,) = options
    with pytest.raises(ValueError, match=name):
        PACT(8, **options)
