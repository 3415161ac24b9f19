"""Caches of pruned prompts whose rows are moved, copied or stored, by the caller or by beam search."""

from __future__ import annotations

import copy
import functools
import io
import pickle

import pytest
import torch
from transformers import DynamicCache, StaticCache

import autoprune
from autoprune import AutoPrune, Budget
from autoprune.engine.cache.pruned import PrunedCache
from autoprune.errors import UnsupportedError
from tests import oracle, zoo
from tests.counting import launches
from tests.scattered import DEEP, PRE_LLM, Scattered

METHODS = {
    "deep": Scattered(DEEP),
    "pre_llm": Scattered(PRE_LLM),
    "compacted": Scattered(DEEP, positions="compacted"),
}
close = functools.partial(torch.testing.assert_close, atol=3e-4, rtol=0)
model_of = functools.cache(zoo.build)


@pytest.fixture(scope="module")
def model():
    return model_of("llava")


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.inference_mode():
        yield


@pytest.fixture(params=METHODS)
def method(request):
    return METHODS[request.param]


def words(*shape, seed=0):
    return torch.randint(10, 100, shape, generator=torch.Generator().manual_seed(seed))


def columns_of(trace, inputs):
    return oracle.columns_from_trace(trace.samples, inputs["attention_mask"], zoo.LAYERS)


def go_on(model, cache, mask, *turns):
    """Logits of some turns on a cache; each is tokens and their mask, [batch, new]. And all of the mask."""
    given = []
    for said, shown in turns:
        mask = torch.cat([mask, shown], dim=1)
        position = torch.arange(mask.shape[1])[None, -said.shape[1] :]
        out = model(
            input_ids=said, attention_mask=mask, past_key_values=cache, position_ids=position
        )
        given.append(out.logits)
    return torch.cat(given, dim=1), mask


def expected_of(model, inputs, columns, method, rows, said, mask):
    """The oracle's logits of new tokens behind the prompts of some rows, the pictures in their order."""
    length, prompts = inputs["input_ids"].shape[1], len(inputs["input_ids"])
    logits = [None] * len(rows)
    while None in [entry if entry is None else 0 for entry in logits]:
        # One row of each prompt at a time.
        turn = {row: i for i, row in enumerate(rows) if logits[i] is None}
        behind = [turn.get(prompt, 0) for prompt in range(prompts)]
        whole = oracle.append(model, inputs, said[behind])
        whole["attention_mask"] = torch.cat(
            [inputs["attention_mask"], mask[behind][:, length:]], dim=1
        )
        whole["position_ids"] = torch.arange(mask.shape[1])[None]
        out = oracle.oracle_forward(model, whole, columns, method.positions)
        for row, i in turn.items():
            logits[i] = out[row, length:]
    return torch.stack(logits)


def by_cache(cache, name, argument):
    getattr(cache, name)(argument)


def by_layers(cache, name, argument):
    for layer in cache.layers:
        getattr(layer, name)(argument)


MOVES = {
    "repeat": ("batch_repeat_interleave", 2, [0, 0, 1, 1, 2, 2]),
    "reorder": ("reorder_cache", torch.tensor([2, 0, 1]), [2, 0, 1]),
    "reorder to one": ("reorder_cache", torch.tensor([1, 1, 1]), [1, 1, 1]),
    "select": ("batch_select_indices", torch.tensor([2, 0]), [2, 0]),
    "select a list": ("batch_select_indices", [1, 2], [1, 2]),
    "select by mask": ("batch_select_indices", torch.tensor([True, False, True]), [0, 2]),
}


@pytest.mark.parametrize(
    ("change", "move"), [*((name, by_cache) for name in MOVES), ("reorder", by_layers)]
)
def test_rows_that_are_moved_take_along_what_is_remembered(model, method, change, move):
    inputs, cache = zoo.inputs("llava", model, "padded3"), DynamicCache()
    name, argument, rows = MOVES[change]
    first, then = words(len(rows), 4), words(len(rows), 1, seed=1)
    shown = torch.ones_like(first)
    shown[0, :2] = 0
    with method(model) as trace:
        model(**inputs, past_key_values=cache)
        move(cache, name, argument)
        mask = inputs["attention_mask"][rows]
        one = torch.ones_like(then)
        logits, mask = go_on(model, cache, mask, (then, one), (first, shown), (then, one))
    said = torch.cat([then, first, then], dim=1)
    expected = expected_of(model, inputs, columns_of(trace, inputs), method, rows, said, mask)
    real = mask[:, -said.shape[1] :].bool()
    close(logits[real], expected[real])
    assert (expected[real] - expected.flip(0)[real]).abs().max() > 1.0


def test_questions_that_are_padded_differently_on_one_repeated_prompt(model, method):
    inputs, cache = zoo.inputs("llava", model), DynamicCache()
    said, shown = words(2, 4), torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    with method(model) as trace:
        model(**inputs, past_key_values=cache)
        cache.batch_repeat_interleave(2)
        mask = inputs["attention_mask"].expand(2, -1)
        logits, mask = go_on(model, cache, mask, (said, shown))
    expected = expected_of(model, inputs, columns_of(trace, inputs), method, [0, 0], said, mask)
    close(logits[shown.bool()], expected[shown.bool()])


def test_rows_are_moved_again_while_they_go_on(model, method):
    """As beam search does, but across prompts; the masks that were made go along."""
    inputs, cache, rows = zoo.inputs("llava", model, "padded3"), DynamicCache(), [0, 1, 2]
    said, given = torch.empty(3, 0, dtype=torch.long), []
    mask = inputs["attention_mask"]
    with method(model) as trace:
        model(**inputs, past_key_values=cache)
        for step, index in enumerate([[1, 0, 2], [2, 2, 1], [0, 2, 1]]):
            new = words(3, 1, seed=step)
            logits, mask = go_on(model, cache, mask, (new, torch.ones_like(new)))
            said = torch.cat([said, new], dim=1)
            given.append(logits)
            cache.reorder_cache(torch.tensor(index))
            mask, said = mask[index], said[index]
            given = [logits[index] for logits in given]
            rows = [rows[i] for i in index]
    expected = expected_of(model, inputs, columns_of(trace, inputs), method, rows, said, mask)
    close(torch.cat(given, dim=1), expected)


def test_rows_of_a_static_cache_are_reordered(model, method):
    inputs = zoo.inputs("llava", model, "padded3")
    length, rows = inputs["input_ids"].shape[1], [2, 0, 1]
    cache = StaticCache(config=model.config.get_text_config(), max_cache_len=length + 8)
    said, then = words(3, 4), words(3, 1, seed=1)
    shown = torch.ones_like(said)
    shown[1, :3] = 0
    with method(model) as trace:
        model(**inputs, past_key_values=cache)
        first, mask = go_on(model, cache, inputs["attention_mask"], (said, shown))
        cache.reorder_cache(torch.tensor(rows))
        second, mask = go_on(model, cache, mask[rows], (then, torch.ones_like(then)))
    said = torch.cat([said[rows], then], dim=1)
    expected = expected_of(model, inputs, columns_of(trace, inputs), method, rows, said, mask)
    real = mask[:, -5:].bool()
    close(torch.cat([first[rows], second], dim=1)[real], expected[real])


def test_a_cropped_cache_is_moved_and_goes_on(model, method):
    inputs, cache, rows = zoo.inputs("llava", model, "padded3"), DynamicCache(), [2, 1]
    said = words(2, 3)
    with method(model) as trace:
        model(**inputs, past_key_values=cache)
        cache.crop(-2)
        cache.batch_select_indices(torch.tensor(rows))
        mask = inputs["attention_mask"][rows, :-2]
        logits, mask = go_on(model, cache, mask, (said, torch.ones_like(said)))
    columns = [kept[:, :-2] for kept in columns_of(trace, inputs)]
    shorter = inputs | {name: inputs[name][:, :-2] for name in ("input_ids", "attention_mask")}
    close(logits, expected_of(model, shorter, columns, method, rows, said, mask))


def joined(caches):
    """One cache of several, made by hand."""
    first = caches[0]
    for layers in zip(*(cache.layers for cache in caches), strict=True):
        layers[0].keys = torch.cat([layer.keys for layer in layers])
        layers[0].values = torch.cat([layer.values for layer in layers])
    return first


def test_rows_that_were_moved_by_hand_are_refused(model, method):
    inputs = zoo.inputs("llava", model)
    with method(model):
        caches = [model(**inputs, use_cache=True).past_key_values for _ in range(2)]
        with pytest.raises(
            UnsupportedError, match=r"2 rows go on .* remembers 1 rows; move its rows by"
        ):
            model(input_ids=words(2, 1), past_key_values=joined(caches))


def test_a_batch_of_which_nothing_is_remembered_is_refused(model):
    inputs = zoo.inputs("llava", model, "padded3")
    with AutoPrune(Budget.ratio(0.5))(model):
        cache = model(**inputs, use_cache=True).past_key_values
        copied = DynamicCache([(layer.keys, layer.values) for layer in cache.layers])
        with pytest.raises(UnsupportedError, match="layers of this cache differ in length"):
            model(input_ids=words(3, 1), past_key_values=copied)


def test_one_prompt_of_which_nothing_is_remembered_goes_on_as_before(model):
    inputs = zoo.inputs("llava", model)
    with METHODS["deep"](model):
        cache = model(**inputs, use_cache=True).past_key_values
        copied = DynamicCache([(layer.keys, layer.values) for layer in cache.layers])
        expected = model(input_ids=words(1, 1), past_key_values=cache).logits
        close(model(input_ids=words(1, 1), past_key_values=copied).logits, expected)


def through_pickle(cache):
    return pickle.loads(pickle.dumps(cache))


def through_a_file(cache):
    file = io.BytesIO()
    torch.save(cache, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("make", ["growing", "static"])
@pytest.mark.parametrize("copied", [through_pickle, through_a_file, copy.deepcopy])
@pytest.mark.parametrize("batch", ["single", "padded3"])
def test_a_stored_cache_goes_on(model, method, batch, copied, make):
    inputs, cache = zoo.inputs("llava", model, batch), DynamicCache()
    length, prompts = inputs["input_ids"].shape[1], len(inputs["input_ids"])
    if make == "static":
        cache = StaticCache(config=model.config.get_text_config(), max_cache_len=length + 8)
    said, then = words(prompts, 3), words(prompts, 1, seed=1)
    turns = [(said, torch.ones_like(said)), (then, torch.ones_like(then))]
    with method(model) as trace:
        model(**inputs, past_key_values=cache)
        other = copied(cache)
        # What goes on with one of them is nothing to the other.
        given, mask = go_on(model, other, inputs["attention_mask"], *turns)
        again, _ = go_on(model, cache, inputs["attention_mask"], *turns)
    columns, rows = columns_of(trace, inputs), list(range(prompts))
    said = torch.cat([said, then], dim=1)
    expected = expected_of(model, inputs, columns, method, rows, said, mask)
    close(given, expected)
    close(again, expected)


@pytest.mark.parametrize("name", ["fastervlm", "visionzip", "divprune", "cdpruner", "tome"])
def test_a_stored_cache_of_a_method_that_cuts_before_the_decoder_goes_on(model, name):
    inputs = zoo.inputs("llava", model, "padded3")
    with autoprune.create(name, budget=Budget.ratio(0.5))(model):
        cache = model(**inputs, use_cache=True).past_key_values
        other, mask = through_pickle(cache), inputs["attention_mask"]
        turn = words(3, 2), torch.ones(3, 2, dtype=torch.long)
        expected, _ = go_on(model, cache, mask, turn)
        close(go_on(model, other, mask, turn)[0], expected)
        assert other.get_seq_length() == cache.get_seq_length() == mask.shape[1] + 2


def test_a_stored_cache_is_an_ordinary_one_after_a_reset(model):
    inputs = zoo.inputs("llava", model)
    with METHODS["pre_llm"](model):
        cache = through_pickle(model(**inputs, use_cache=True).past_key_values)
    assert isinstance(cache, DynamicCache) and PrunedCache.of(cache) is not None
    cache.reset()
    assert PrunedCache.of(cache) is None
    assert not any("Pruned" in type(layer).__name__ for layer in cache.layers)


@pytest.mark.parametrize(("batch", "extra"), [("single", 1), ("padded3", 1)])
def test_moving_rows_launches_little_more_than_the_cache_does(model, batch, extra):
    """As beam search does at every step: what is remembered is moved once, not in every layer."""
    inputs, index = zoo.inputs("llava", model, batch), torch.arange(3 if batch != "single" else 1)
    plain = model(**inputs, use_cache=True).past_key_values
    with METHODS["deep"](model):
        cache = model(**inputs, use_cache=True).past_key_values
    with launches() as expected:
        plain.reorder_cache(index)
    with launches() as counted:
        cache.reorder_cache(index)
    assert sum(expected.values()) == 2 * zoo.LAYERS
    assert sum((counted - expected).values()) == extra
