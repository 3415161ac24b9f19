"""What a method is shown at a cut, against the attention and hidden states of the slow oracle."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch

from autoprune import AutoPrune, Budget
from autoprune.contract import Needs
from autoprune.engine.attention import rows as observer
from autoprune.parts.scorers import text_attention
from tests import oracle, zoo
from tests.scattered import DEEP, Scattered

SETTINGS = [(name, a) for name, family in zoo.FAMILIES.items() for a in family.attentions]
model_of = functools.cache(zoo.build)


@dataclass(frozen=True)
class Watching(Scattered):
    """Prunes like `Scattered` and remembers what it was shown before every layer but the first."""

    rows: str = "text"
    ahead: bool = False
    shown: list[tuple[Any, torch.Tensor]] = field(default_factory=list)

    def needs(self, cut, state):
        return Needs(rows=self.rows, ahead=self.ahead, hidden=True) if cut else None

    def select(self, seen, state):
        self.shown.append((replace(seen), seen.hidden().clone()))
        return super().select(seen, state)


def watch(name, attention, batch, rows, ahead=False):
    """What a pruned forward showed; the oracle's attention in, and states entering, each layer."""
    model = model_of(name, attention)
    inputs = zoo.inputs(name, model, batch)
    method = Watching(DEEP, rows=rows, ahead=ahead)
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


@pytest.mark.parametrize("batch", ["padded3", "padded3_text"])
@pytest.mark.parametrize(("name", "attention"), SETTINGS)
def test_looking_ahead_shows_the_attention_of_the_layer_behind_the_cut(name, attention, batch):
    inputs, samples, shown, attentions, _ = watch(name, attention, batch, rows="last", ahead=True)
    uncut = [seen for seen, _ in shown if not any(seen.cut in shares for shares in DEEP)]
    assert uncut, "the oracle's attention is that of the tokens shown only where nothing is cut"
    for seen in uncut:
        for row, sample in enumerate(samples):
            if sample.num_visual:
                visual, text = places(inputs, sample, row)
                index = seen.index[row][seen.mask[row]]
                rows = seen.attention[row][:, seen.text_mask[row]][..., seen.mask[row]]
                wanted = attentions[seen.cut][row][:, text[-1:]][..., visual[index]]
                torch.testing.assert_close(rows, wanted, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "internvl", "gemma3", "qwen3_vl"])
def test_looking_ahead_changes_nothing(name):
    model = model_of(name, zoo.FAMILIES[name].attentions[0])
    inputs = zoo.inputs(name, model, "padded3")
    results = []
    for ahead in (False, True):
        with Watching(DEEP, rows="last", ahead=ahead)(model), torch.no_grad():
            out = model(**inputs, use_cache=True)
        results.append([out.logits, *(layer.keys for layer in out.past_key_values.layers)])
    assert all(map(torch.equal, *results))


@dataclass(frozen=True)
class Projections(Watching):
    """Cuts nothing and remembers keys and queries."""

    def needs(self, cut, state):
        return Needs(keys=True) if cut else None

    def select(self, seen, state):
        self.shown.append((seen, (seen.keys(), seen.text_keys(), seen.queries())))


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "internvl", "qwen3_vl"])
def test_keys_and_queries_are_those_of_the_layer_before(name):
    model = model_of(name, "eager")
    inputs = zoo.inputs(name, model, "padded3")
    method = Projections()
    with method(model) as trace, torch.no_grad():
        out = model(**inputs, output_attentions=True)
    for seen, (keys, text_keys, queries) in method.shown:
        cached = out.past_key_values.layers[seen.cut - 1].keys
        for row, sample in enumerate(trace.samples):
            visual, text = places(inputs, sample, row)
            real = seen.mask[row]
            assert torch.equal(keys[row][:, real], cached[row][:, visual])
            assert torch.equal(text_keys[row][:, seen.text_mask[row]], cached[row][:, text])
            query, key = queries[row][:, real], keys[row][:, real]
            key = key.repeat_interleave(query.shape[0] // key.shape[0], dim=0)
            scores = (query @ key.transpose(1, 2)) * query.shape[-1] ** -0.5
            weights = out.attentions[seen.cut - 1][row][:, visual][..., visual]
            shares = scores[:, -1].softmax(dim=-1)
            torch.testing.assert_close(
                shares, weights[:, -1] / weights[:, -1].sum(-1, keepdim=True), atol=1e-4, rtol=0
            )


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
@pytest.mark.parametrize("first_cut", ["after_layer_0", "pre_llm"])
def test_hidden_states_come_back_in_the_prompts_own_columns(batch, first_cut):
    model = zoo.build("llava", "sdpa")
    inputs = zoo.inputs("llava", model, batch)
    with torch.no_grad(), AutoPrune(Budget.ratio(0.4), first_cut=first_cut)(model) as trace:
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


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "gemma3"])
def test_attention_in_pieces_is_the_same(name, monkeypatch):
    attention = zoo.FAMILIES[name].attentions[0]
    whole = [seen for seen, _ in watch(name, attention, "padded3", rows="text")[2]]
    monkeypatch.setattr(observer, "SCORE_BYTES", 1)
    pieces = [seen for seen, _ in watch(name, attention, "padded3", rows="text")[2]]
    for one, other in zip(whole, pieces, strict=True):
        torch.testing.assert_close(one.attention, other.attention, atol=1e-6, rtol=0)


def test_scores_of_the_text_are_float32_whatever_the_default():
    seen = watch("llava", "sdpa", "padded3_text", rows="text")[2][0][0]
    wanted = text_attention(seen)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.autocast("cpu", torch.bfloat16):
            scores = text_attention(seen)
    finally:
        torch.set_default_dtype(torch.float32)
    assert scores.dtype == torch.float32 and torch.equal(scores, wanted)


@dataclass(frozen=True)
class Loose(Scattered):
    """Gives more or less padding than a cut needs."""

    padding: int = 2

    def select(self, seen, state):
        selection = super().select(seen, state)
        wide = torch.nn.functional.pad(selection.kept, (0, self.padding), value=-1)
        return replace(selection, kept=wide)


@pytest.mark.parametrize("batch", ["single", "padded3"])
def test_padding_of_a_selection_may_be_wide_but_not_short(batch):
    model = model_of("llava", "sdpa")
    inputs = zoo.inputs("llava", model, batch)
    with torch.no_grad():
        with Scattered(DEEP)(model):
            wanted = model(**inputs).logits
        with Loose(DEEP)(model):
            assert torch.equal(model(**inputs).logits, wanted)
        with (
            Loose(DEEP, padding=-1)(model),
            pytest.raises(ValueError, match=r"kept of shape \[\d, \d+\] at cut 1"),
        ):
            model(**inputs)


def test_a_selection_has_a_row_for_every_prompt():
    class OneRow(Scattered):
        def select(self, seen, state):
            selection = super().select(seen, state)
            return replace(selection, kept=selection.kept[:1])

    model = model_of("llava", "sdpa")
    inputs = zoo.inputs("llava", model, "single")
    inputs = {name: value.repeat_interleave(2, dim=0) for name, value in inputs.items()}
    with (
        torch.no_grad(),
        OneRow(({1: 0.5},))(model),
        pytest.raises(
            ValueError, match=r"kept of shape \[1, \d+\] at cut 1, .* expected \[2, that"
        ),
    ):
        model(**inputs)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_float64_model_keeps_what_a_float32_one_does(attention):
    # The first prompt's question is longer than all of the other prompt: rows of padding see nothing.
    model = zoo.build("llava", attention)
    inputs = zoo.inputs("llava", model, "padded3")
    more = torch.randint(10, 100, (3, 60), generator=torch.Generator().manual_seed(0))
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    long = torch.cat([ids, more], dim=1)
    short = torch.cat([torch.zeros_like(more), ids], dim=1)
    padding = torch.cat([torch.zeros_like(more), mask], dim=1)
    is_long = torch.tensor([[True], [False], [False]])
    inputs["input_ids"] = torch.where(is_long, long, short)
    inputs["attention_mask"] = torch.where(is_long, torch.cat([mask, more.sign()], dim=1), padding)
    kept = {}
    for dtype in (torch.float32, torch.float64):
        pixels = inputs["pixel_values"].to(dtype)
        with AutoPrune(Budget.ratio(0.5))(model.to(dtype)) as trace, torch.no_grad():
            model(**inputs | {"pixel_values": pixels})
        kept[dtype] = [[layer.tolist() for layer in sample.kept] for sample in trace.samples]
    assert kept[torch.float32] == kept[torch.float64]
