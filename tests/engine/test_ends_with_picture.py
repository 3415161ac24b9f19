"""Prompts whose last token is visual: it stays, as its logits are asked for, and the budget is spent."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch

import autoprune
from autoprune import AutoPrune, AutoPruneReference, Budget
from autoprune.contract import Merged, Selection
from autoprune.engine.tokens.layout import Layout
from autoprune.engine.tokens.merged import cut_and_merge, with_last_tokens
from autoprune.engine.tokens.present import NEW, Tokens
from autoprune.methods import METHODS
from autoprune.policy.budget import InfeasibleBudget
from tests import oracle, zoo
from tests.scattered import Scattered
from tests.spy import Spy, for_oracle

TOLERANCE = 3e-4
RATIO = Budget.ratio(0.27)
# The middle one of three prompts goes on with text.
ENDING = (0, 2)
model_of = functools.cache(zoo.build)


def ending(name, model, batch="padded3", rows=ENDING, side="left", media="image"):
    """A batch of the zoo, in which prompts `rows` end with their last visual token."""
    inputs = zoo.inputs(name, model, batch, media=media)
    visual = zoo.visual_mask(model, inputs["input_ids"])
    along = [key for key, value in inputs.items() if value.shape == visual.shape]
    columns = []
    for row, real in enumerate(inputs["attention_mask"].bool()):
        own = real.nonzero().squeeze(1)
        if row in rows:
            own = own[own <= visual[row].nonzero().max()]
        columns.append(own)
    width = max(map(len, columns))
    for key in along:
        old, new = inputs[key], inputs[key].new_zeros(len(columns), width)
        for row, own in enumerate(columns):
            place = slice(width - len(own), None) if side == "left" else slice(len(own))
            new[row, place] = old[row, own]
        inputs[key] = new
    inputs["input_ids"][inputs["attention_mask"] == 0] = zoo.PAD
    return inputs


def created(name, budget):
    if name == "autoprune_reference":
        return autoprune.create(name, budget=4, recycle=False)
    return autoprune.create(name, budget=budget)


CASES = [
    ("llava", "single", "image"),
    ("llava", "padded3", "image"),
    ("qwen2_5_vl", "padded3", "image"),
    ("qwen2_5_vl", "padded3", "video"),
    ("internvl", "padded3", "image"),
    ("gemma3", "padded3", "image"),
]


@pytest.mark.parametrize(("family", "batch", "media"), CASES)
@pytest.mark.parametrize("name", METHODS)
def test_pruning_equals_the_oracle(name, family, batch, media):
    model = model_of(family, zoo.FAMILIES[family].attentions[0])
    if name == "autoprune_reference" and family in ("qwen2_5_vl", "gemma3"):
        pytest.skip("compacted positions are refused there")
    # Behind a picture at the end, Qwen itself gives a new token other positions with a cache than without.
    steps = 0 if family == "qwen2_5_vl" else 2
    inputs = ending(family, model, batch, media=media)
    spy = Spy(created(name, RATIO))
    with spy(model) as trace:
        logits, tokens = oracle.generate_logits(model, inputs, steps=steps)
    (decisions,) = spy.decisions
    visual = zoo.visual_mask(model, inputs["input_ids"])
    kept, states = for_oracle(decisions, inputs, visual, zoo.LAYERS)
    expected = oracle.oracle_logits(model, inputs, kept, tokens[:, :steps], spy.positions, states)
    assert (logits - expected).abs().max() < TOLERANCE
    assert logits[:, 0].abs().amax(dim=1).min() > 1.0
    plain = oracle.plain_logits(model, inputs)
    for row, sample in enumerate(trace.samples):
        counts = [int((kept[layer][row] & visual[row]).sum()) for layer in range(zoo.LAYERS)]
        assert counts == sample.tokens_per_layer
        # A single token of text or none is all that is left to tell the difference by.
        assert (expected[row, 0] - plain[row, 0]).abs().max() > 0.05
        if row in ENDING:
            assert all(int(layer[-1]) == sample.num_visual - 1 for layer in sample.kept)


@pytest.mark.parametrize("budget", [RATIO, Budget.tokens(4), Budget.flops(0.6)], ids=str)
@pytest.mark.parametrize("name", [n for n in METHODS if n != "autoprune_reference"])
def test_the_budget_is_spent_as_of_other_prompts(name, budget):
    model = model_of("llava", "sdpa")
    spent = []
    for rows in ((), (0, 1, 2)):
        # The same numbers of visual and other tokens: text goes to the front instead.
        inputs = zoo.inputs("llava", model, "padded3")
        if rows:
            inputs = text_first(model, inputs)
        try:
            with torch.no_grad(), created(name, budget)(model) as trace:
                model(**inputs)
        except InfeasibleBudget:
            spent.append(None)
            continue
        spent.append([sum(s.tokens_per_layer) for s in trace.samples])
        limit = [budget.value * s.flops_full for s in trace.samples]
        if budget.kind == "flops":
            assert all(s.flops <= most for s, most in zip(trace.samples, limit, strict=True))
        else:
            full = [s.num_visual if budget.kind == "ratio" else 1 for s in trace.samples]
            most = [round(zoo.LAYERS * budget.value * n) for n in full]
            assert all(
                sum(s.tokens_per_layer) <= n for s, n in zip(trace.samples, most, strict=True)
            )
            if name == "autoprune":
                assert spent[-1] == most
    if name == "no_image":
        assert spent == [[0] * 3, [zoo.LAYERS] * 3]
    elif name not in ("vtw", "pact") and (name, budget.kind) != ("autoprune", "flops"):
        assert spent[0] == spent[1]


def text_first(model, inputs):
    """Every prompt's text before its pictures."""
    inputs = dict(inputs)
    ids, visual = inputs["input_ids"], zoo.visual_mask(model, inputs["input_ids"])
    inputs["input_ids"] = torch.stack(
        [torch.cat([row[~here], row[here]]) for row, here in zip(ids, visual, strict=True)]
    )
    return inputs


@pytest.mark.parametrize("name", ["autoprune", "visionzip", "sparsevlm", "vtw", "no_image"])
def test_a_batch_padded_on_the_right_gets_what_each_prompt_gets_alone(name):
    model = model_of("llava", "sdpa")
    inputs = ending("llava", model, side="right")
    lengths = inputs["attention_mask"].sum(dim=1).tolist()
    with torch.no_grad(), created(name, RATIO)(model):
        logits = model(**inputs).logits
        for row, length in enumerate(lengths):
            alone = model(
                input_ids=inputs["input_ids"][row : row + 1, :length],
                pixel_values=pixels_of(inputs, model, row),
            ).logits[0, -1]
            torch.testing.assert_close(logits[row, length - 1], alone, atol=TOLERANCE, rtol=0)


def pixels_of(inputs, model, row):
    tokens = zoo.visual_mask(model, inputs["input_ids"]).sum(dim=1)
    pictures = (tokens * len(inputs["pixel_values"]) // tokens.sum()).tolist()
    first = sum(pictures[:row])
    return inputs["pixel_values"][first : first + pictures[row]]


def test_the_last_token_displaces_the_worst_where_tokens_are_ranked():
    """Each cut of AutoPrune keeps its n - 1 best of the others."""
    model = model_of("llava", "sdpa")
    inputs = ending("llava", model, "single", rows=(0,))
    seen = []

    class Watching(AutoPrune):
        def select(self, observation, state):
            if observation.cut > 1:
                seen.append((observation, self._scores(observation, state)))
            return super().select(observation, state)

    with torch.no_grad(), Watching(RATIO, rank_every=1)(model) as trace:
        model(**inputs)
    (sample,) = trace.samples
    cuts = 0
    for observation, scores in seen:
        last = observation.counts[0] - 1
        assert observation.required[0].nonzero().tolist() == [[last]]
        kept = sample.kept[observation.cut]
        best = scores[0, :last].topk(len(kept) - 1).indices.sort().values
        present = observation.index[0]
        assert kept.tolist() == [*present[best].tolist(), present[last].item()]
        cuts += len(kept) <= last
    assert cuts > 1


def test_what_is_merged_stands_before_the_last_token():
    visual = np.array([[False, True, True, True, True]])
    layout = Layout(np.ones_like(visual), visual)
    assert layout.ends_visual == [True]
    tokens = Tokens.of(layout, torch.device("cpu"))
    merged = Merged(torch.zeros(1, 2, 3), [2])
    selection = Selection(torch.tensor([[0]]), [1], merged)
    selection, forced = with_last_tokens(tokens, selection, layout.ends_visual)
    assert selection.kept.tolist() == [[3]] and forced.tolist() == [[True]]
    left, source = cut_and_merge(tokens, selection, layout.ends_visual)
    assert left.index.tolist() == [[NEW, NEW, 3]]
    assert source.tolist() == [[0, 5, 6, 4]]


def test_the_released_recycling_keeps_the_last_token_last():
    model = model_of("llava", "sdpa")
    inputs = ending("llava", model, "single", rows=(0,))
    with torch.no_grad(), AutoPruneReference(6)(model) as trace:
        logits = model(**inputs, logits_to_keep=1).logits
    (sample,) = trace.samples
    assert sum(map(len, sample.kept)) < sum(sample.tokens_per_layer), "some were merged"
    assert all(int(kept[-1]) == sample.num_visual - 1 for kept in sample.kept)
    assert logits.abs().max() > 1.0


def test_a_prompt_of_nothing_but_a_picture():
    model = model_of("llava", "sdpa")
    inputs = zoo.inputs("llava", model)
    only = inputs["input_ids"][:, zoo.visual_mask(model, inputs["input_ids"])[0]]
    for method in (AutoPrune(RATIO), Scattered(({1: 0.0},))):
        with torch.no_grad(), method(model) as trace:
            logits = model(input_ids=only, pixel_values=inputs["pixel_values"]).logits
        (sample,) = trace.samples
        assert logits[0, -1].abs().max() > 1.0
        assert all(int(kept[-1]) == sample.num_visual - 1 for kept in sample.kept)
    assert sample.tokens_per_layer == [sample.num_visual] + [1] * (zoo.LAYERS - 1)
