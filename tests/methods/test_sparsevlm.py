"""SparseVLM: its raters, its lists of tokens, and the tokens it keeps and recycles."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from autoprune import Budget
from autoprune.contract import Observation, PromptState
from autoprune.methods.sparsevlm import SparseVLM, priority_heads, raters
from tests import zoo
from tests.methods.shown import kept_of, shown

COUNTS, ROWS = [30, 7, 18], [6, 9, 1]


def slow_raters(visual: np.ndarray, text: np.ndarray) -> list[int]:
    """Text tokens whose share of the visual tokens' attention is above the mean."""
    share = np.zeros(len(text))
    for v in visual:
        weights = np.exp(text @ v - (text @ v).max())
        share += weights / weights.sum() / len(visual)
    return [i for i in range(len(text)) if share[i] > share.mean()] or list(range(len(text)))


def test_raters_are_the_words_that_more_than_average_matches():
    given = shown(COUNTS, ROWS)
    found = raters(given.observation(cut=0))
    for row, (count, words) in enumerate(zip(COUNTS, ROWS, strict=True)):
        visual, text = given.hidden[row, :count].numpy(), given.text_hidden[row, :words].numpy()
        wanted = slow_raters(visual.astype(float), text.astype(float))
        assert found[row].nonzero().squeeze(1).tolist() == wanted
    assert wanted == [0], "a single word is no better than average, but rates"


@pytest.mark.parametrize("recycle", [False, True])
def test_tokens_are_ranked_by_the_raters_attention_only(recycle):
    given, counts = shown(COUNTS, ROWS), [16, 5, 9]
    state = PromptState(None, None, notes={"raters": raters(given.observation(cut=0))})
    selection = SparseVLM(8, recycle=recycle).choose(given.observation(), counts, state)
    merged = selection.merged.counts if recycle else [0, 0, 0]
    assert [k + m for k, m in zip(selection.counts, merged, strict=True)] == counts
    assert not recycle or min(merged) > 0
    for row, kept in enumerate(kept_of(selection)):
        rows = state.notes["raters"][row].nonzero().squeeze(1)
        scores = given.attention[row][:, rows, : COUNTS[row]].double().mean(dim=(0, 1))
        assert kept == sorted(scores.argsort(descending=True)[: len(kept)].tolist())


def test_what_is_recycled_is_inside_the_budget_and_at_a_dropped_tokens_place():
    given, counts = shown(COUNTS, ROWS), [16, 5, 9]
    state = PromptState(None, None, notes={"raters": raters(given.observation(cut=0))})
    selection = SparseVLM(8).choose(given.observation(), counts, state)
    for row, kept in enumerate(kept_of(selection)):
        places = selection.merged.place[row, : selection.merged.counts[row]].tolist()
        assert not set(places) & set(kept)
        assert len(set(places)) == len(places)


def test_the_official_lists_come_out_at_their_own_price():
    for levels in ([66, 30, 17], [238, 48, 26], [303, 110, 36], [303, 200, 110]):
        wanted = [576] * 3 + [levels[0]] * 4 + [levels[1]] * 9 + [levels[2]] * 16
        assert SparseVLM(sum(wanted) / 32).plan(32, 576) == wanted


def test_the_second_version_has_lists_of_its_own():
    for levels in ([66, 34, 20], [246, 54, 28], [246, 108, 60], [300, 200, 118]):
        wanted = [576] * 3 + [levels[0]] * 4 + [levels[1]] * 9 + [levels[2]] * 16
        assert SparseVLM(sum(wanted) / 32, version=2).plan(32, 576) == wanted


def test_the_second_version_ranks_by_the_heads_that_look_at_the_picture_most():
    given, counts = shown(COUNTS, ROWS), [16, 5, 9]
    # Of 4 heads 4 x 14 / 32 = 1.75, which is 2, and in each prompt others.
    for row, (one, other) in enumerate([(1, 3), (0, 2), (2, 3)]):
        given.attention[row, [one, other]] *= 3
    state = PromptState(None, None, notes={"raters": raters(given.observation(cut=0))})
    selection = SparseVLM(8, version=2).choose(given.observation(), counts, state)
    assert selection.merged is None and selection.counts == counts
    for row, (kept, heads) in enumerate(
        zip(kept_of(selection), [[1, 3], [0, 2], [2, 3]], strict=True)
    ):
        rows = state.notes["raters"][row].nonzero().squeeze(1)
        scores = given.attention[row, heads][:, rows, : COUNTS[row]].double().mean(dim=(0, 1))
        assert kept == sorted(scores.argsort(descending=True)[: len(kept)].tolist())


def test_14_of_32_heads_count_by_what_the_raters_pay_to_the_picture():
    # Head h gives the picture h; a word that does not rate would turn that round.
    attention = torch.arange(32.0)[None, :, None, None].repeat(1, 1, 2, 5)
    attention[:, :, 1] = 100 - attention[:, :, 1]
    mask = torch.tensor([[True, True, True, True, False]])
    attention[:, 0, :, 4] = 1e6  # padding
    seen = Observation(3, [4], torch.arange(5)[None], mask, attention)
    found = priority_heads(seen, torch.tensor([[True, False]]))
    assert sorted(found[0, :, 0, 0].tolist()) == list(range(18, 32))


def test_a_version_that_there_is_not_is_refused():
    with pytest.raises(ValueError, match="version must be one of \\(1, 2\\), got 3"):
        SparseVLM(8, version=3)


def test_other_budgets_lie_between_the_lists_and_waste_little():
    before = [0] * 32
    for budget in (56, 64, 100, 128, 160, 192, 250, 400, 575):
        plan = SparseVLM(budget).plan(32, 576)
        assert 32 * budget - 16 <= sum(plan) <= 32 * budget
        assert all(a <= b for a, b in zip(before, plan, strict=True))
        before = plan
    assert SparseVLM(576).plan(32, 576) == [576] * 32


def test_words_are_compared_at_the_embeddings_and_rate_in_the_layer_before_the_cut():
    model = zoo.build("llava", "eager")
    inputs = zoo.inputs("llava", model, "padded3_text")
    embedded = []
    hook = (
        model.get_decoder()
        .layers[0]
        .register_forward_pre_hook(lambda _, args: embedded.append(args[0]))
    )
    with torch.no_grad():
        attentions = model(**inputs, output_attentions=True).attentions
        hook.remove()
        with SparseVLM(Budget.ratio(0.5), recycle=False)(model) as trace:
            model(**inputs)
    visual = zoo.visual_mask(model, inputs["input_ids"])
    assert not trace.samples[1].num_visual
    for row in (0, 2):
        sample = trace.samples[row]
        columns = visual[row].nonzero().squeeze(1)
        words = inputs["attention_mask"][row].nonzero().squeeze(1)
        words = words[words > columns.max()]
        states = embedded[0][row].double().numpy()
        chosen = words[slow_raters(states[columns], states[words])]
        cut = next(i for i, n in enumerate(sample.tokens_per_layer) if n < sample.num_visual)
        scores = attentions[cut - 1][row][:, chosen][:, :, columns].mean(dim=(0, 1))
        best = scores.topk(sample.tokens_per_layer[cut]).indices.sort().values
        assert sample.kept[cut].tolist() == best.tolist()
