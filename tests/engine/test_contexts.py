"""Several contexts on one model: in threads, by handles, and what copies of the model are."""

from __future__ import annotations

import copy
import functools
import inspect
import io
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import autoprune
from autoprune import AutoPrune, Budget
from autoprune.errors import UnsupportedError
from autoprune.methods.fastv import FastV
from autoprune.methods.hiprune import HiPrune
from autoprune.methods.random import Random
from autoprune.methods.tome import ToMe
from tests import zoo
from tests.engine.test_attach import everything_in, logits_of

HALF, LESS = AutoPrune(Budget.ratio(0.5)), FastV(Budget.ratio(0.4))
# What they must see of the tower differs: scores; merging; two blocks, keys and places; nothing.
DIFFERENT = [HALF, ToMe(Budget.ratio(0.4)), HiPrune(Budget.ratio(0.3)), Random(Budget.ratio(0.6))]
PATIENCE = 60.0


@pytest.fixture
def model():
    return zoo.build("llava", "sdpa")


@pytest.fixture
def inputs(model):
    batch = zoo.inputs("llava", model)
    logits_of(model, batch)  # transformers installs hooks of its own in the first forward
    return batch


def in_thread(run, *args):
    """What `run` returns, or raises, in a thread of its own."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(run, *args).result(PATIENCE)


def expected_of(model, inputs, method):
    with method(model):
        return logits_of(model, inputs)


def generated(model, inputs):
    return model.generate(**inputs, max_new_tokens=3, do_sample=False)


class Gate:
    """Holds the forwards of the thread that asks for it, in front of a module."""

    def __init__(self, module):
        self.reached, self.opened = threading.Event(), threading.Event()
        self._thread = None
        self._handle = module.register_forward_pre_hook(self._hold)

    def for_this_thread(self):
        self._thread = threading.current_thread()

    def _hold(self, *_):
        if threading.current_thread() is self._thread:
            self.reached.set()
            assert self.opened.wait(PATIENCE)


def test_many_threads_with_methods_of_their_own(model):
    batches = [zoo.inputs("llava", model, "padded3", seed=seed) for seed in range(len(DIFFERENT))]
    logits_of(model, batches[0])
    plain = logits_of(model, batches[0])
    before, functions = everything_in(model), dict(ALL_ATTENTION_FUNCTIONS)
    expected = []
    for method, batch in zip(DIFFERENT, batches, strict=True):
        with method(model):
            expected.append((logits_of(model, batch), generated(model, batch)))
    start = threading.Barrier(len(DIFFERENT))

    def work(which):
        """30 forwards, in contexts that are entered and left all the time; how many were as they should be."""
        start.wait(PATIENCE)
        right, samples = 0, 0
        for turn in range(10):
            with DIFFERENT[which](model) as trace:
                right += torch.equal(logits_of(model, batches[which]), expected[which][0])
                right += torch.equal(generated(model, batches[which]), expected[which][1])
                if turn % 2:
                    right += torch.equal(logits_of(model, batches[which]), expected[which][0])
                samples += len(trace.samples)
        return right, samples

    with ThreadPoolExecutor(len(DIFFERENT)) as pool:
        done = list(pool.map(work, range(len(DIFFERENT)), timeout=600))
    assert done == [(25, 75)] * len(DIFFERENT)
    assert everything_in(model) == before
    assert dict(ALL_ATTENTION_FUNCTIONS) == functions
    assert torch.equal(logits_of(model, batches[0]), plain)


def test_hooks_are_installed_once_and_leave_with_the_last_context(model, inputs):
    before = everything_in(model)
    one, two = HALF(model), LESS(model)
    one.attach(for_all=False)
    shared = {name: seen[:2] for name, seen in everything_in(model).items() if name != "attention"}
    in_thread(functools.partial(two.attach, for_all=False))
    again = {name: seen[:2] for name, seen in everything_in(model).items() if name != "attention"}
    assert shared == again
    one.detach()
    assert everything_in(model) != before
    two.detach()
    assert everything_in(model) == before


def test_a_thread_is_served_by_its_own_context_first(model, inputs):
    half, less = expected_of(model, inputs, HALF), expected_of(model, inputs, LESS)

    def own():
        with LESS(model) as trace:
            assert torch.equal(logits_of(model, inputs), less)
        return len(trace.samples)

    handle = HALF.attach(model)
    try:
        assert in_thread(own) == 1
        assert torch.equal(in_thread(logits_of, model, inputs), half)
        assert torch.equal(logits_of(model, inputs), half)
    finally:
        handle.detach()
    assert len(handle.trace.samples) == 2
    with HALF(model):
        assert in_thread(own) == 1
        assert torch.equal(logits_of(model, inputs), half)


def test_a_thread_without_a_context_is_served_by_the_only_one(model, inputs):
    expected = expected_of(model, inputs, HALF)
    with HALF(model) as trace:
        assert torch.equal(in_thread(logits_of, model, inputs), expected)
    assert len(trace.samples) == 1


def test_a_thread_without_a_context_is_refused_between_several(model, inputs):
    other = LESS(model)
    with HALF(model):
        in_thread(functools.partial(other.attach, for_all=False))
        for run in (logits_of, generated):
            with pytest.raises(UnsupportedError, match="2 contexts prune this model in other"):
                in_thread(run, model, inputs)
        logits_of(model, inputs)
    # Left over is the only one.
    assert torch.equal(logits_of(model, inputs), in_thread(logits_of, model, inputs))
    other.detach()
    assert len(other.trace.samples) == 2


def test_a_generation_stays_with_the_context_that_it_began_with(model, inputs):
    """As with a streamer: the block is entered here, and `generate` runs in another thread."""
    with HALF(model):
        expected = generated(model, inputs)
    other, gate = LESS(model), Gate(model.get_decoder().layers[3])

    def generate():
        gate.for_this_thread()
        return generated(model, inputs)

    with HALF(model) as trace, ThreadPoolExecutor(1) as pool:
        running = pool.submit(generate)
        assert gate.reached.wait(PATIENCE)
        in_thread(functools.partial(other.attach, for_all=False))
        gate.opened.set()
        assert torch.equal(running.result(PATIENCE), expected)
    other.detach()
    assert len(trace.samples) == 1 and not other.trace.samples


@pytest.mark.parametrize("leaving", DIFFERENT, ids=lambda method: method.name)
def test_leaving_a_context_does_not_disturb_the_forward_of_another(model, inputs, leaving):
    expected = expected_of(model, inputs, HALF)
    before = everything_in(model)
    # In the vision tower, and in the decoder.
    for module in (model.base_model.vision_tower.encoder.layers[0], model.get_decoder().layers[3]):
        gate = Gate(module)

        def work(gate=gate):
            with HALF(model):
                gate.for_this_thread()
                return logits_of(model, inputs)

        handle = leaving.attach(model)
        with ThreadPoolExecutor(1) as pool:
            running = pool.submit(work)
            assert gate.reached.wait(PATIENCE)
            handle.detach()
            gate.opened.set()
            assert torch.equal(running.result(PATIENCE), expected)
        gate._handle.remove()
        assert everything_in(model) == before


def test_two_contexts_on_one_thread_or_two_handles_are_refused(model):
    with HALF(model), pytest.raises(UnsupportedError, match=r"autoprune\.detach\(model\)"):
        LESS.attach(model)
    handle = HALF.attach(model)
    with pytest.raises(UnsupportedError, match="being pruned already"), LESS(model):
        pass
    with pytest.raises(UnsupportedError, match="being pruned already, in all threads"):
        in_thread(LESS.attach, model)
    handle.detach()


def test_a_handle_encodes_by_its_own_method_in_any_thread(model, inputs):
    if "mm_encoder_outputs" not in inspect.signature(model.forward).parameters:
        pytest.skip("this release takes no features")
    text = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    handle = HALF.attach(model)
    expected = logits_of(model, inputs)

    def encode_within_another():
        with Random(4)(model):  # sees nothing of the tower
            return handle.encode(**inputs)

    features = in_thread(encode_within_another)
    again = logits_of(model, {**text, "mm_encoder_outputs": features})
    handle.detach()
    torch.testing.assert_close(again, expected)
    first, second = handle.trace.samples
    assert [k.tolist() for k in first.kept] == [k.tolist() for k in second.kept]


def test_contexts_on_the_model_and_on_the_part_below_its_head(model, inputs):
    before = everything_in(model)
    base = model.base_model
    with torch.no_grad(), HALF(base):
        expected = base(**inputs).last_hidden_state
    whole = expected_of(model, inputs, LESS)

    def own():
        with LESS(model):
            return logits_of(model, inputs), generated(model, inputs)

    with torch.no_grad(), HALF(base):
        assert torch.equal(in_thread(own)[0], whole)
        assert torch.equal(base(**inputs).last_hidden_state, expected)
    assert everything_in(model) == before


def test_detach_ends_what_lost_handles_left(model, inputs):
    before, plain = everything_in(model), logits_of(model, inputs)
    HALF.attach(model)
    in_thread(functools.partial(LESS(model).attach, for_all=False))
    assert not torch.equal(logits_of(model, inputs), plain)
    autoprune.detach(model)
    assert everything_in(model) == before
    assert torch.equal(logits_of(model, inputs), plain)
    autoprune.detach(model)
    autoprune.detach(torch.nn.Linear(2, 2))


def test_detach_knows_the_model_by_its_parts_and_by_what_holds_it(model, inputs):
    before = everything_in(model)
    for given in (model.base_model, model.get_decoder(), torch.nn.ModuleList([model])):
        handle = HALF.attach(model)
        autoprune.detach(given)
        assert everything_in(model) == before
        handle.detach()
    with HALF(model):
        autoprune.detach(model)
        with LESS(model):
            logits_of(model, inputs)
    assert everything_in(model) == before


def test_detach_says_what_it_takes(model):
    handle = HALF.attach(model)
    with pytest.raises(ValueError, match=r"got Attachment; call its own detach\(\)"):
        autoprune.detach(handle)
    with pytest.raises(ValueError, match="the model that is pruned, got str"):
        autoprune.detach("llava")
    handle.detach()


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
@pytest.mark.parametrize("method", [HALF, ToMe(Budget.ratio(0.4))], ids=lambda m: m.name)
def test_a_copy_of_a_pruned_model_is_a_plain_model(how, method):
    def copied(module):
        if how == "deepcopy":
            return copy.deepcopy(module)
        if how == "pickle":
            return pickle.loads(pickle.dumps(module))
        torch.save(module, stream := io.BytesIO())
        stream.seek(0)
        return torch.load(stream, weights_only=False)

    model = zoo.build("llava", "sdpa")
    inputs = zoo.inputs("llava", model)
    if how == "deepcopy":
        logits_of(model, inputs)  # hooks of transformers' own, which cannot be pickled
    before = everything_in(copied(model))
    with method(model):
        twin, base = copied(model), copied(model.base_model)
        after = everything_in(twin)
        pruned = logits_of(model, inputs)
    del before["attention"], after["attention"]
    assert after == before
    plain, tokens = logits_of(model, inputs), generated(model, inputs)
    for module in (*twin.modules(), *base.modules()):
        assert "__reduce_ex__" not in module.__dict__
    assert torch.equal(logits_of(twin, inputs), plain)
    assert torch.equal(generated(twin, inputs), tokens)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(generated(twin, inputs), tokens)
    with method(twin):
        assert torch.equal(logits_of(twin, inputs), pruned)


def test_a_copy_keeps_what_the_user_put_on_the_model(model, inputs):
    model.generate = functools.partial(print)
    model.get_decoder().layers[0].register_forward_hook(functools.partial(noted))
    with HALF(model):
        twin = copy.deepcopy(model)
    assert isinstance(twin.generate, functools.partial)
    (hook,) = twin.get_decoder().layers[0]._forward_hooks.values()
    assert hook.func is noted


def noted(*_):
    """A hook of the user's."""


def test_methods_are_copied_and_handles_are_not(model):
    assert copy.deepcopy(HALF) == HALF and pickle.loads(pickle.dumps(HALF)) == HALF
    mixed = autoprune.per_prompt([HALF, None])
    assert copy.deepcopy(mixed) == mixed
    handle = HALF.attach(model)
    for copied in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(UnsupportedError, match="a handle cannot be copied or pickled"):
            copied(handle)
    handle.detach()
    assert copy.deepcopy(handle.trace).summary() == handle.trace.summary()


def test_a_handle_can_be_used_again(model, inputs):
    before, expected = everything_in(model), expected_of(model, inputs, HALF)
    handle = HALF.attach(model)
    assert handle.is_attached and repr(handle).endswith(
        "on LlavaForConditionalGeneration, attached>"
    )
    with pytest.raises(UnsupportedError, match="by this very handle"):
        handle.attach()
    with pytest.raises(UnsupportedError, match="by this very handle"), handle:
        pass
    assert torch.equal(logits_of(model, inputs), expected)
    handle.detach()
    handle.detach()
    assert not handle.is_attached and repr(handle).endswith(", not attached>")
    assert everything_in(model) == before
    handle.attach()
    assert torch.equal(logits_of(model, inputs), expected)
    handle.detach()
    with handle as trace:
        assert torch.equal(logits_of(model, inputs), expected)
    assert everything_in(model) == before
    assert trace is handle.trace and len(trace.samples) == 3


def test_a_model_may_be_moved_between_attaching_and_running(model, inputs):
    wide = {
        name: value.double() if value.is_floating_point() else value
        for name, value in inputs.items()
    }
    prepared = HALF(model)
    model.double()
    expected = expected_of(model, wide, HALF)
    with prepared:
        assert torch.equal(logits_of(model, wide), expected)
    handle = HALF.attach(model)
    narrow = logits_of(model.float(), inputs)
    torch.testing.assert_close(narrow.double(), expected, atol=1e-3, rtol=0)
    handle.detach()


def test_failing_to_attach_leaves_nothing(model, inputs, monkeypatch):
    before = everything_in(model)
    monkeypatch.setattr("autoprune.engine.attention.tap.tag", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        HALF.attach(model)
    monkeypatch.undo()
    assert everything_in(model) == before
    with HALF(model) as trace:
        logits_of(model, inputs)
    assert len(trace.samples) == 1
