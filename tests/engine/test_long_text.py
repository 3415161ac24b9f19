"""Questions with many text rows: which of them are looked at, and what that takes."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from autoprune import AutoPruneReference, Budget, create
from autoprune.bench.measure import hold_once
from autoprune.contract import LAST_ROWS, MOST_ROWS, Needs
from autoprune.engine.attention import rows as observer
from autoprune.engine.tokens import layout
from autoprune.engine.tokens.layout import sample_rows
from tests import oracle, zoo
from tests.engine.test_observations import places, watch
from tests.scattered import Scattered
from tests.test_bench_memory import wide

model_of = functools.cache(zoo.build)


@pytest.fixture
def few_rows(monkeypatch):
    """A bound so low that the zoo's questions are beyond it."""
    monkeypatch.setattr(layout, "MOST_ROWS", 5)
    monkeypatch.setattr(layout, "LAST_ROWS", 2)
    monkeypatch.setattr(observer, "ROWS_AT_ONCE", 2)


def longer(model, words):
    """The zoo's prompt with so many more words behind it."""
    inputs = zoo.inputs("llava", model)
    more = torch.randint(10, 100, (1, words), generator=torch.Generator().manual_seed(0))
    ids = torch.cat([inputs["input_ids"], more], dim=1)
    return inputs | {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def test_ordinary_questions_are_looked_at_whole():
    assert (MOST_ROWS, LAST_ROWS) == (128, 32)
    for number in (0, 1, 17, MOST_ROWS):
        assert sample_rows(number).tolist() == list(range(number))[::-1]


@pytest.mark.parametrize("number", [129, 200, 1000, 8000])
def test_of_more_rows_a_sample_is_looked_at(number):
    place = number - 1 - sample_rows(number)
    assert len(place) == MOST_ROWS and place[0] == 0
    assert place[-LAST_ROWS:].tolist() == list(range(number - LAST_ROWS, number))
    spaced = place[: MOST_ROWS - LAST_ROWS + 1]
    steps = spaced[1:] - spaced[:-1]
    assert steps.min() >= 1 and steps.max() - steps.min() <= 1, "evenly"


@pytest.mark.parametrize("batch", ["single", "padded3", "padded3_text"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "gemma3"])
def test_rows_of_the_sample_are_the_models_own(name, attention, batch, few_rows):
    inputs, samples, shown, attentions, _ = watch(name, attention, batch, rows="text")
    sampled = 0
    for seen, _ in shown:
        maps = attentions[seen.cut - 1]
        for row, sample in enumerate(samples):
            if not sample.num_visual:
                continue
            visual, text = places(inputs, sample, row)
            wanted = text[len(text) - 1 - torch.from_numpy(sample_rows(len(text)).copy())]
            sampled += len(text) > 5
            assert len(wanted) == min(len(text), 5)
            index = seen.index[row][seen.mask[row]]
            rows = seen.attention[row][:, seen.text_mask[row]][..., seen.mask[row]]
            expected = maps[row][:, wanted][..., visual[index]]
            torch.testing.assert_close(rows, expected, atol=1e-4, rtol=0)
    assert sampled


@pytest.mark.parametrize("name", ["autoprune", "sparsevlm", "dart", "cdpruner"])
def test_a_sample_is_the_same_alone_and_in_a_batch(name, few_rows):
    model = model_of("llava", "sdpa")
    with create(name, Budget.ratio(0.5))(model) as trace:
        oracle.generate_logits(model, zoo.inputs("llava", model, "padded3_text"), steps=0)
        for row in range(3):
            alone = zoo.inputs("llava", model, "padded3_text", only=row)
            oracle.generate_logits(model, alone, steps=0)
    for first, second in zip(trace.samples[:3], trace.samples[3:], strict=True):
        assert [k.tolist() for k in first.kept] == [k.tolist() for k in second.kept]
        if first.num_visual and first.mutual_information is not None:
            assert first.mutual_information == pytest.approx(second.mutual_information, abs=1e-5)


@dataclass(frozen=True)
class Looking(Scattered):
    """Cuts nothing and asks for rows of one kind."""

    rows: str = "text"
    looked: list[Any] = field(default_factory=list)

    def needs(self, cut, state):
        return Needs(rows=self.rows, hidden=True) if cut else None

    def select(self, seen, state):
        self.looked.append((seen, seen.text_hidden()))


@pytest.mark.parametrize("rows", ["text", "all", "last"])
def test_the_contract_says_which_rows_are_shown(rows):
    model, number = model_of("llava", "sdpa"), 308
    inputs = longer(model, 300)
    method = Looking(rows=rows)
    with torch.no_grad(), method(model):
        states = model(**inputs, output_hidden_states=True).hidden_states
    place = {"text": number - 1 - sample_rows(number), "all": range(number), "last": [number - 1]}
    columns = [inputs["input_ids"].shape[1] - number + int(row) for row in place[rows]]
    assert len(method.looked) == zoo.LAYERS - 1
    for seen, text in method.looked:
        assert seen.attention.shape[2] == seen.text_mask.shape[1] == len(columns)
        assert torch.equal(text, states[seen.cut][:, columns])


def test_the_released_code_looks_at_every_row():
    assert AutoPruneReference(6).needs(1, None).rows == "all"


@pytest.mark.parametrize(("words", "close"), [(100, 0.05), (400, 0.02)])
@pytest.mark.parametrize("name", ["autoprune", "autoprune_reference"])
def test_the_peak_counts_what_a_look_takes(name, words, close):
    model = wide("llava")
    held = hold_once(model, longer(model, words), create(name, 9))
    (sample,) = held.samples
    assert held.peak == pytest.approx(sample.peak_bytes, rel=close)
    if name == "autoprune_reference":
        assert sample.peak_bytes > sample.peak_bytes_full, "every row is looked at"
    elif words == 400:
        assert sample.peak_bytes < sample.peak_bytes_full
