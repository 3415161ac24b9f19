"""What a method is shown at a cut, against the attention and hidden states of the slow oracle."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch

from autoprune import AutoPrune, Budget
from autoprune.method import Needs
from tests import oracle, zoo
from tests.scattered import DEEP, Scattered

SETTINGS = [(name, a) for name, family in zoo.FAMILIES.items() for a in family.attentions]
model_of = functools.cache(zoo.build)


@dataclass(frozen=True)
class Watching(Scattered):
    """Prunes like `Scattered` and remembers what it was shown before every layer but the first."""

    rows: str = "text"
    shown: list[tuple[Any, torch.Tensor]] = field(default_factory=list)

    def needs(self, cut, state):
        return Needs(rows=self.rows, hidden=True) if cut else None

    def select(self, seen, state):
        self.shown.append((replace(seen), seen.hidden().clone()))
        return super().select(seen, state)


def watch(name, attention, batch, rows):
    """What a pruned forward showed; the oracle's attention in, and states entering, each layer."""
    model = model_of(name, attention)
    inputs = zoo.inputs(name, model, batch)
    method = Watching(DEEP, rows=rows)
    with method(model) as trace, torch.no_grad():
        model(**inputs)
    mask = inputs["attention_mask"]
    columns = oracle.columns_from_trace(trace.samples, mask, zoo.LAYERS)
    plain = model_of(name, "eager")
    entering, hooks = [], []
    for layer in plain.get_decoder().layers:
        # Not `output_hidden_states`: what is added between two layers (deepstack) belongs to it.
        hook = layer.register_forward_pre_hook(lambda _, args: entering.append(args[0].clone()))
        hooks.append(hook)
    with oracle.hiding(plain, columns), torch.no_grad():
        attentions = plain(**inputs, use_cache=False, output_attentions=True).attentions
    for hook in hooks:
        hook.remove()
    return inputs, trace.samples, method.shown, attentions, entering


def places(inputs, sample, row):
    """Columns of a prompt's visual tokens, and of the text behind the last of them."""
    real = inputs["attention_mask"][row].nonzero().squeeze(1)
    visual = real[sample.visual_positions]
    return visual, real[real > visual[-1]]


@pytest.mark.parametrize("batch", ["padded3", "padded3_text"])
@pytest.mark.parametrize(("name", "attention"), SETTINGS)
def test_attention_is_the_models_own(name, attention, batch):
    inputs, samples, shown, attentions, _ = watch(name, attention, batch, rows="text")
    assert [seen.cut for seen, _ in shown] == list(range(1, zoo.LAYERS))
    for seen, _ in shown:
        maps = attentions[seen.cut - 1]
        for row, sample in enumerate(samples):
            if not sample.num_visual:
                continue
            visual, text = places(inputs, sample, row)
            index = seen.index[row][seen.mask[row]]
            assert index.tolist() == sample.kept[seen.cut - 1].tolist()
            assert seen.counts[row] == len(index)
            rows = seen.attention[row][:, seen.text_mask[row]][..., seen.mask[row]]
            wanted = maps[row][:, text][..., visual[index]]
            torch.testing.assert_close(rows, wanted, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", zoo.FAMILIES)
def test_the_last_row_is_the_prompts_last_token(name):
    attention = zoo.FAMILIES[name].attentions[0]
    inputs, samples, shown, attentions, _ = watch(name, attention, "padded3", rows="last")
    for seen, _ in shown:
        maps = attentions[seen.cut - 1]
        for row, sample in enumerate(samples):
            visual, text = places(inputs, sample, row)
            index = seen.index[row][seen.mask[row]]
            rows = seen.attention[row][:, seen.text_mask[row]][..., seen.mask[row]]
            wanted = maps[row][:, text[-1:]][..., visual[index]]
            torch.testing.assert_close(rows, wanted, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", zoo.FAMILIES)
def test_hidden_states_are_those_entering_the_cut(name):
    attention = zoo.FAMILIES[name].attentions[0]
    inputs, samples, shown, _, entering = watch(name, attention, "padded3", rows="last")
    for seen, hidden in shown:
        for row, sample in enumerate(samples):
            visual, _ = places(inputs, sample, row)
            index = seen.index[row][seen.mask[row]]
            wanted = entering[seen.cut][row, visual[index]]
            torch.testing.assert_close(hidden[row][seen.mask[row]], wanted, atol=1e-3, rtol=0)


@pytest.mark.parametrize("batch", ["single", "padded3_text"])
def test_hidden_states_come_back_in_the_prompts_own_columns(batch):
    model = zoo.build("llava", "sdpa")
    inputs = zoo.inputs("llava", model, batch)
    with torch.no_grad(), AutoPrune(Budget.ratio(0.4))(model) as trace:
        states = model(**inputs, output_hidden_states=True).hidden_states
    real = inputs["attention_mask"].bool()
    kept = oracle.columns_from_trace(trace.samples, inputs["attention_mask"], zoo.LAYERS)
    with torch.no_grad(), oracle.hiding(model, kept):
        expected = model(**inputs, output_hidden_states=True, use_cache=False).hidden_states
    assert len(states) == zoo.LAYERS + 1
    for index, (ours, theirs) in enumerate(zip(states, expected, strict=True)):
        there = kept[max(index - 1, 0)] & real
        torch.testing.assert_close(ours[there], theirs[there], atol=2e-4, rtol=0)
        assert not ours[real & ~there].any(), "dropped tokens are zero"
