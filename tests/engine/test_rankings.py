"""Cuts that follow from one ranking: against the oracle, in batches, and what is refused."""

from __future__ import annotations

import functools
import threading
from dataclasses import dataclass, field
from typing import ClassVar

import pytest
import torch

from autoprune import AutoPrune, Budget
from autoprune.contract import Needs, Ranking, Selection
from autoprune.methods.base import Method
from autoprune.parts.selectors import top_k
from tests import oracle, zoo

model_of = functools.cache(zoo.build)

# Windows of three of the six layers: 2 to 4, and 5.
WINDOWS = {"rank_every": 16}
METHODS = {
    "mild": AutoPrune(Budget.ratio(0.6), **WINDOWS),
    "steep": AutoPrune(Budget.ratio(0.4), k0=4.0, gamma=2.0, **WINDOWS),
    "late": AutoPrune(Budget.ratio(0.6), mi_layer=3, **WINDOWS),
    "stairs": AutoPrune(Budget.ratio(0.4), cut_every=2, **WINDOWS),
}


@dataclass(frozen=True)
class ByPlan(Method):
    """Keeps what a fixed table of scores says, by a schedule; it answers with rankings or selections."""

    name: ClassVar[str] = "by plan"
    paper: ClassVar[str] = "none"

    counts: tuple[int, ...] = (20, 14, 12, 9, 6, 6)
    rankings: dict[int, int] = field(default_factory=dict)
    selects: tuple[int, ...] = ()
    budget: Budget = field(default_factory=lambda: Budget.ratio(1.0))

    def begin(self, state):
        state.schedule = [[min(n, c) for c in self.counts] for n in state.prompts.num_visual]

    def needs(self, cut, state):
        return Needs() if cut in self.rankings or cut in self.selects else None

    def select(self, seen, state):
        scores = torch.rand(4096, generator=torch.Generator().manual_seed(seen.cut))
        scores = scores[seen.index.clamp(min=0)]
        if seen.cut in self.rankings:
            return Ranking(scores, self.rankings[seen.cut])
        counts = [plan[seen.cut] for plan in state.schedule]
        return Selection(top_k(scores, counts, seen.mask), counts)


@pytest.mark.parametrize("batch", ["single", "padded3"])
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "gemma3", "internvl"])
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_a_window_of_cuts_equals_the_oracle(method, name, batch):
    model = model_of(name)
    found = oracle.compare(model, zoo.inputs(name, model, batch), method)
    assert found.worst < 2e-4


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_a_prompt_is_cut_in_a_batch_as_it_is_alone(method):
    model = model_of("llava")
    inputs = zoo.inputs("llava", model, "padded3")
    with torch.no_grad(), method(model) as together:
        model(**inputs)
    first, pixels = 0, inputs["pixel_values"]
    each = sum(sample.num_visual for sample in together.samples) // len(pixels)
    for row, sample in enumerate(together.samples):
        real = inputs["attention_mask"][row].bool()
        own = {"input_ids": inputs["input_ids"][row, real][None]}
        number = sample.num_visual // each
        if number:
            own["pixel_values"] = pixels[first : first + number]
        first += number
        with torch.no_grad(), method(model) as alone:
            model(**own)
        (expected,) = alone.samples
        assert sample.schedule == expected.schedule
        assert [k.tolist() for k in sample.kept] == [k.tolist() for k in expected.kept]


def test_every_window_begins_at_the_same_cuts_whatever_falls_in_it():
    method = AutoPrune(64, rank_every=8)
    windows = [method._window(cut, 32) for cut in range(32)]
    assert windows[:3] == [(0, 1), (1, 2), (2, 10)]
    assert windows[9] == (2, 10) and windows[10] == (10, 18) and windows[31] == (26, 32)
    assert AutoPrune(64, rank_every=1)._window(7, 64) == (7, 8)
    assert AutoPrune(64, merger="dpc_knn")._window(7, 32) == (7, 8)
    late = AutoPrune(64, mi_layer=5)
    assert late._window(4, 32) == (2, 6) and late._window(6, 32) == (6, 14)


@pytest.mark.parametrize("batch", ["single", "padded3"])
def test_a_cut_that_no_ranking_made_is_made_up_for(batch):
    """The schedule falls before layer 2, where the method says nothing."""
    model = model_of("llava")
    inputs = zoo.inputs("llava", model, batch)
    ranked = ByPlan(rankings={1: 2, 3: 4, 4: 5})
    selected = ByPlan(selects=(1, 3, 4))
    with torch.no_grad(), ranked(model):
        logits = model(**inputs).logits
    with torch.no_grad(), selected(model):
        expected = model(**inputs).logits
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)


def test_a_decision_within_a_ranking_is_refused():
    model = model_of("llava")
    inputs = zoo.inputs("llava", model, "single")
    twice = ByPlan(rankings={1: 5}, selects=(3,))
    with (
        torch.no_grad(),
        twice(model),
        pytest.raises(ValueError, match="its last ranking was to hold until cut 5"),
    ):
        model(**inputs)


def test_a_schedule_that_rises_is_refused():
    model = model_of("llava")
    inputs = zoo.inputs("llava", model, "single")
    rising = ByPlan(counts=(20, 9, 12, 9, 6, 6), rankings={1: 6})
    with (
        torch.no_grad(),
        rising(model),
        pytest.raises(ValueError, match=r"state\.schedule must not rise"),
    ):
        model(**inputs)


def test_merging_in_a_ragged_batch_runs_in_float64():
    model = zoo.build("llava").double()
    inputs = zoo.inputs("llava", model, "padded3")
    inputs["pixel_values"] = inputs["pixel_values"].double()
    del inputs["attention_mask"]
    method = AutoPrune(Budget.ratio(0.5), merger="dpc_knn", k0=4.0, gamma=2.0)
    with torch.no_grad(), method(model):
        assert model(**inputs).logits.isfinite().all()


def test_a_handle_that_is_detached_elsewhere_leaves_a_forward_alone():
    model = model_of("llava")
    inputs = zoo.inputs("llava", model, "single")
    method = METHODS["mild"]
    with torch.no_grad(), method(model):
        expected = model(**inputs).logits
    handle, go, done = method.attach(model), threading.Event(), threading.Event()

    def other():
        with method(model):
            go.wait(60)
            handle.detach()
            done.set()
            leave.wait(60)

    leave = threading.Event()
    thread = threading.Thread(target=other)
    thread.start()

    def hook(*_):
        go.set()
        done.wait(60)

    watched = model.get_decoder().layers[4].register_forward_pre_hook(hook)
    try:
        with torch.no_grad():
            logits = model(**inputs).logits
    finally:
        watched.remove()
        leave.set()
        thread.join()
        handle.detach()
    assert torch.equal(logits, expected)
    assert len(handle.trace.samples) == 1


def test_the_measured_speed_draws_no_random_numbers(monkeypatch):
    from autoprune.engine import speed
    from autoprune.engine.locate import locate

    monkeypatch.setattr(speed, "_measured", {})
    torch.manual_seed(0)
    state = torch.get_rng_state()
    speed.device_speed(locate(model_of("llava")))
    assert torch.equal(torch.get_rng_state(), state)
