"""The record of a day of serving: bounded, exact in its sums, and never waited for."""

from __future__ import annotations

import functools
import gc
import json
import math
import pickle

import pytest
import torch

from autoprune import AutoPrune, Budget, create
from autoprune.engine import record as recording
from autoprune.trace import WAITING, Totals, Trace
from tests import zoo

METHOD = AutoPrune(Budget.ratio(0.5))
ROWS = 8
model_of = functools.cache(zoo.build)


@functools.cache
def prompts(seed):
    """Eight prompts of one picture each, all different, of the tiny random LLaVA."""
    alone = [zoo.inputs("llava", model_of("llava"), seed=ROWS * seed + row) for row in range(ROWS)]
    return {name: torch.cat([prompt[name] for prompt in alone]) for name in alone[0]}


def serve(handle, batches):
    with torch.no_grad():
        for number in range(batches):
            handle.model(**prompts(number % 5), use_cache=True)


def live_tensors():
    gc.collect()
    return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())


def test_a_thousand_prompts_hold_the_memory_of_the_last_hundred():
    handle = METHOD.attach(model_of("llava"), keep=100)
    forty = {name: values.repeat(5, 1) for name, values in prompts(0).items() if values.ndim == 2}
    forty["pixel_values"] = prompts(0)["pixel_values"].repeat(5, 1, 1, 1)

    def serve_forty(times):
        with torch.no_grad():
            for _ in range(times):
                handle.model(**forty, use_cache=True)
        return live_tensors(), len(pickle.dumps(handle.trace))

    few, many = serve_forty(5), serve_forty(20)
    handle.detach()
    assert many[0] <= few[0]  # of this and all other tests of the process
    # What 800 prompts more would hold as they are kept is 0.65 MB.
    assert abs(many[1] - few[1]) < 2_000
    assert many[1] < 150_000
    assert len(handle.trace) == len(handle.trace.samples) == 100
    assert handle.trace.dropped == 900
    assert handle.trace.summary().prompts == 1000


def test_the_summary_counts_what_is_no_longer_kept_to_the_last_bit():
    seen, few = [], METHOD.attach(model_of("llava"), keep=3, on_sample=lambda s: seen.append(s))
    serve(few, 12)
    few.detach()
    with METHOD(model_of("llava")) as trace, torch.no_grad():
        for number in range(12):
            model_of("llava")(**prompts(number % 5))
    assert few.trace.summary() == trace.summary()
    assert len(seen) == len(trace) == 12 * ROWS
    summary = few.trace.summary()
    assert summary.prompts == summary.prompts_with_images == len(seen)
    bits = math.fsum(sample.mutual_information for sample in seen) / len(seen)
    assert summary.mutual_information == pytest.approx(bits, rel=1e-15)
    saved = 1 - sum(int(s.flops) for s in seen) / sum(int(s.flops_full) for s in seen)
    assert summary.flops_saved == saved
    assert (
        summary.mean_tokens == sum(sum(s.tokens_per_layer) for s in seen) / len(seen) / zoo.LAYERS
    )


def test_sums_stay_exact_where_floats_do_not():
    half = Totals(prompts=1, flops=2**53 + 1, flops_full=2**54 + 2)
    assert (half + half).flops == 2**54 + 2


def test_the_last_samples_are_kept_whatever_the_batches():
    with METHOD(model_of("llava")) as trace, torch.no_grad():
        for number in range(3):
            model_of("llava")(**prompts(number))
    whole = [sample.mutual_information for sample in trace.samples]
    for keep in (0, 1, ROWS, ROWS + 3, 100):
        handle = METHOD.attach(model_of("llava"), keep=keep)
        serve(handle, 3)
        handle.detach()
        last = [sample.mutual_information for sample in handle.trace.samples]
        assert last == whole[max(len(whole) - keep, 0) :]
        assert handle.trace.dropped == len(whole) - len(last)


def test_a_handle_keeps_a_thousand_and_a_block_all(monkeypatch):
    handle = METHOD.attach(model_of("llava"))
    handle.detach()
    assert handle.trace.keep == 1000
    assert METHOD(model_of("llava")).trace.keep is None
    everything = METHOD.attach(model_of("llava"), keep=None)
    everything.detach()
    assert everything.trace.keep is None


@pytest.mark.parametrize("keep", [-1, 1.5, True, "10"])
def test_keep_is_a_number_of_samples(keep):
    with pytest.raises(ValueError, match="keep must be how many samples a trace keeps"):
        METHOD(model_of("llava"), keep=keep)


def test_the_callback_must_be_one():
    with pytest.raises(ValueError, match="on_sample must be a function of one sample, got 'log'"):
        METHOD.attach(model_of("llava"), on_sample="log")


def test_every_sample_is_told_once_and_in_order_and_may_be_read_meanwhile():
    told = []
    with METHOD(model_of("llava"), on_sample=lambda s: told.append((s, len(trace)))) as trace:
        serve(trace_of(trace), 3)
    assert [sample for sample, _ in told] == trace.samples
    assert [length for _, length in told] == [8] * 8 + [16] * 8 + [24] * 8


def trace_of(trace):
    """What `serve` wants."""
    return type("Handle", (), {"model": model_of("llava"), "trace": trace})


class Slow(recording.Copy):
    """Numbers that arrive when the test says so, as from a GPU."""

    arrived = 0
    made = 0

    def __init__(self, parts, largest):
        super().__init__(parts, largest)
        self.number, Slow.made = Slow.made, Slow.made + 1
        self.waited = False

    @property
    def is_here(self):
        return self.number < Slow.arrived

    def read(self):
        if not self.is_here:
            Slow.waits.append(self.number)
        return super().read()


@pytest.fixture
def slow(monkeypatch):
    monkeypatch.setattr(Slow, "arrived", 0)
    monkeypatch.setattr(Slow, "made", 0)
    monkeypatch.setattr(Slow, "waits", [], raising=False)
    monkeypatch.setattr(recording, "Copy", Slow)
    return Slow


def test_a_prefill_takes_in_earlier_ones_that_are_done_and_waits_for_none(slow):
    told = []
    handle = METHOD.attach(model_of("llava"), on_sample=told.append)
    serve(handle, 3)
    assert told == []
    slow.arrived = 2
    serve(handle, 1)
    assert len(told) == 2 * ROWS
    assert slow.waits == []
    handle.detach()
    assert len(told) == 4 * ROWS
    assert slow.waits == [2, 3]


def test_no_more_than_a_few_prefills_are_on_their_way(slow):
    handle = METHOD.attach(model_of("llava"))
    serve(handle, WAITING)
    assert slow.waits == []
    serve(handle, 2)
    handle.detach()
    # Only what was given to the device that long ago.
    assert slow.waits == [0, 1]
    assert handle.trace.summary().prompts == (WAITING + 2) * ROWS


def test_leaving_without_a_callback_waits_for_nothing(slow):
    with METHOD(model_of("llava")):
        serve(trace_of(None), 2)
    assert slow.waits == []


def test_what_a_callback_raises_comes_out_and_the_trace_goes_on():
    def fail(sample):
        raise ZeroDivisionError

    handle = METHOD.attach(model_of("llava"), on_sample=fail)
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            serve(handle, 1)
    handle.detach()
    assert handle.trace.summary().prompts == 2 * ROWS


def test_a_trace_can_be_pickled_with_its_bound_and_without_its_callback():
    handle = METHOD.attach(model_of("llava"), keep=10, on_sample=lambda sample: None)
    serve(handle, 2)
    again = pickle.loads(pickle.dumps(handle.trace))
    assert (again.keep, again.dropped, len(again)) == (10, 6, 10)
    assert again.summary() == handle.trace.summary()
    pairs = zip(again.samples, handle.trace.samples, strict=True)
    assert all(one.to_dict() == other.to_dict() for one, other in pairs)
    serve(handle, 1)
    handle.detach()
    assert len(again) == 10


def test_a_written_trace_says_how_many_samples_were_dropped(tmp_path):
    handle = METHOD.attach(model_of("llava"), keep=5)
    serve(handle, 2)
    handle.detach()
    handle.trace.to_json(tmp_path / "trace.json")
    written = json.loads((tmp_path / "trace.json").read_text())
    assert written["dropped"] == 2 * ROWS - 5
    assert written["summary"]["prompts"] == 2 * ROWS
    assert written["samples"] == [sample.to_dict() for sample in handle.trace.samples]


def test_a_trace_and_a_sample_say_what_they_are():
    handle = AutoPrune(Budget.ratio(0.5)).attach(model_of("llava"), keep=3)
    assert repr(handle.trace).startswith("<Trace of 0 prompts (0 with images)")
    with torch.no_grad():
        handle.model(**zoo.inputs("llava", handle.model))
    assert repr(handle.trace).startswith(
        "<Trace of 1 prompt (1 with images): 8.0 of 16.0 visual tokens per layer, "
    )
    (sample,) = handle.trace.samples
    counts = list(dict.fromkeys(sample.tokens_per_layer))
    assert counts[0] == 16
    steps = ", ".join(map(str, counts if len(counts) < 6 else [*counts[:3], "...", counts[-1]]))
    assert repr(sample) == (
        f"<Sample of 16 visual and 14 other tokens: 8.0 visual tokens per layer ({steps} in 6 layers), "
        f"{sample.mutual_information:.3f} bits>"
    )
    assert repr(sample.kept) == "<which of 16 visual tokens enter each of 6 layers>"
    serve(handle, 1)
    assert repr(handle.trace).endswith(", of which the last 3 are kept>")
    with torch.no_grad():
        handle.model(input_ids=torch.tensor([[1, 5, 6]]))
    handle.detach()
    assert repr(handle.trace.samples[-1]) == "<Sample of 0 visual and 3 other tokens>"


def test_kept_tokens_are_asked_for_by_layer_like_a_list():
    with create("fastv", Budget.ratio(0.5))(model_of("llava")) as trace, torch.no_grad():
        model_of("llava")(**prompts(0))
    kept = trace.samples[0].kept
    assert len(kept) == zoo.LAYERS
    assert [k.tolist() for k in kept[-2:]] == [kept[4].tolist(), kept[5].tolist()]
    assert kept[-1].dtype == torch.int64
    assert kept[0].tolist() == list(range(16))
    with pytest.raises(IndexError):
        kept[zoo.LAYERS]


def test_a_trace_alone_is_empty():
    assert (len(Trace()), Trace().dropped, Trace().samples) == (0, 0, [])
