"""What a cache that was pruned is used for after its prompt: more turns, cropping, and other prompts."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import DynamicLayer

import autoprune
from autoprune import AutoPrune, Budget
from autoprune.errors import UnsupportedError
from tests import oracle, zoo
from tests.scattered import DEEP, PRE_LLM, Scattered

METHODS = {
    "autoprune": AutoPrune(Budget.ratio(0.5)),
    "deep": Scattered(DEEP),
    "pre_llm": Scattered(PRE_LLM),
    "compacted": Scattered(DEEP, positions="compacted"),
}
close = functools.partial(torch.testing.assert_close, atol=2e-4, rtol=0)


@pytest.fixture(scope="module")
def model():
    return zoo.build("llava")


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.inference_mode():
        yield


@pytest.fixture(params=METHODS)
def method(request):
    return METHODS[request.param]


def words(*shape, seed=0):
    return torch.randint(10, 100, shape, generator=torch.Generator().manual_seed(seed))


def growing(model, room):
    return DynamicCache()


def static(model, room):
    return StaticCache(config=model.config.get_text_config(), max_cache_len=room)


# Older releases of transformers only zero a dynamic cache, which then keeps its length.
RESETTABLE = [static] + [growing] * ("reset" in vars(DynamicLayer))


def columns_of(trace, inputs):
    return oracle.columns_from_trace(trace.samples, inputs["attention_mask"], zoo.LAYERS)


def hidden(*spans):
    """Masks of turns of 4 tokens each, from which the tokens `first` to `last` of prompt 0 are hidden."""
    masks = [torch.ones(3, 4, dtype=torch.long) for _ in spans]
    for mask, (first, last) in zip(masks, spans, strict=True):
        mask[0, first:last] = 0
    return masks


@pytest.mark.parametrize("make", [growing, static])
@pytest.mark.parametrize(
    "says",
    [
        # Mask of each turn at the time of each turn.
        pytest.param([hidden((0, 2))], id="padded question"),
        pytest.param([hidden((0, 0)), hidden((2, 4), (0, 0))], id="finished early"),
        pytest.param(
            [hidden((0, 0)), hidden((2, 4), (0, 0)), hidden((2, 4), (0, 0), (0, 1))], id="both"
        ),
    ],
)
def test_what_the_mask_of_a_later_turn_hides_is_not_seen(model, method, make, says):
    inputs = zoo.inputs("llava", model, "padded3")
    prompt, turns = inputs["attention_mask"], [words(3, 4, seed=turn) for turn in range(len(says))]
    cache, length = make(model, prompt.shape[1] + 16), prompt.shape[1]
    with method(model) as trace:
        model(**inputs, past_key_values=cache)
        for turn, (said, masks) in enumerate(zip(turns, says, strict=True)):
            end = length + 4 * (turn + 1)
            mask = torch.cat([prompt, *masks], dim=1)
            position = torch.arange(end - 4, end)[None]
            out = model(
                input_ids=said, attention_mask=mask, past_key_values=cache, position_ids=position
            )
        one_more = model(
            input_ids=words(3, 1),
            attention_mask=torch.cat([mask, torch.ones(3, 1, dtype=torch.long)], dim=1),
            past_key_values=cache,
            position_ids=torch.tensor([[end]]),
        )
    whole = oracle.append(model, inputs, torch.cat([*turns, words(3, 1)], dim=1))
    whole["attention_mask"] = torch.cat([mask, torch.ones(3, 1, dtype=torch.long)], dim=1)
    whole["position_ids"] = torch.arange(end + 1)[None]
    expected = oracle.oracle_forward(model, whole, columns_of(trace, inputs), method.positions)
    # The tokens that are hidden themselves are not compared.
    real = masks[-1].bool()
    close(out.logits[real], expected[:, -5:-1][real])
    close(one_more.logits[:, 0], expected[:, -1])


@pytest.mark.parametrize("new", [1, 4])
@pytest.mark.parametrize("crop", [1, 3])
@pytest.mark.parametrize("batch", ["single", "padded3"])
def test_a_cache_that_is_cropped_into_the_question_goes_on_from_there(
    model, method, batch, crop, new
):
    inputs, cache = zoo.inputs("llava", model, batch), DynamicCache()
    said = words(len(inputs["input_ids"]), new)
    with method(model) as trace:
        model(**inputs, past_key_values=cache)
        cache.crop(-crop)
        mask = torch.cat([inputs["attention_mask"][:, :-crop], torch.ones_like(said)], dim=1)
        position = torch.arange(mask.shape[1])[None]
        logits = model(
            input_ids=said,
            attention_mask=mask,
            past_key_values=cache,
            position_ids=position[:, -new:],
        ).logits
    columns = [kept[:, :-crop] for kept in columns_of(trace, inputs)]
    shorter = inputs | {name: inputs[name][:, :-crop] for name in ("input_ids", "attention_mask")}
    whole = oracle.append(model, shorter, said)
    whole["position_ids"] = position
    expected = oracle.oracle_forward(model, whole, columns, method.positions)
    close(logits, expected[:, -new:])


def test_a_cache_that_is_cropped_into_the_picture_is_refused(model, method):
    inputs, cache = zoo.inputs("llava", model), DynamicCache()
    text = zoo.visual_mask(model, inputs["input_ids"])[0].flip(0).int().argmax().item()
    with method(model):
        model(**inputs, past_key_values=cache)
        cache.crop(-text - 1)
        with pytest.raises(UnsupportedError, match=f"only the last {text} are text"):
            model(input_ids=words(1, 2), past_key_values=cache)


@pytest.mark.parametrize("name", ["autoprune", "tome", "turbo", "divprune"])
@pytest.mark.parametrize("make", RESETTABLE)
def test_a_cache_that_is_reset_takes_the_next_prompt_as_the_first(model, name, make):
    first, second = (zoo.inputs("llava", model, seed=seed) for seed in (0, 1))
    cache, other = (make(model, first["input_ids"].shape[1] + 4) for _ in range(2))
    with autoprune.create(name, budget=Budget.ratio(0.5))(model) as trace:
        expected = model(**second, past_key_values=other).logits
        for inputs in (first, second):
            logits = model(**inputs, past_key_values=cache).logits
            cache.reset()
    close(logits[:, -1], expected[:, -1])
    assert trace.samples[0].tokens_per_layer == trace.samples[2].tokens_per_layer


def test_logits_of_several_tokens_are_no_drafts(model):
    inputs = zoo.inputs("llava", model)
    length = inputs["input_ids"].shape[1]
    with METHODS["autoprune"](model) as trace:
        expected = model(**inputs).logits
        for keep in (4, length):
            logits = model(**inputs, past_key_values=DynamicCache(), logits_to_keep=keep).logits
            close(logits, expected[:, -keep:])
        # Nor is what a decoding step asked for remembered by the next prompt.
        cache = model(**inputs, use_cache=True).past_key_values
        model(input_ids=words(1, 4), past_key_values=cache, logits_to_keep=4)
        model.model(**inputs)
    assert len({(s.num_text, s.mutual_information) for s in trace.samples}) == 1


@pytest.mark.skipif(growing not in RESETTABLE, reason="this release cannot empty a cache")
def test_drafts_are_expected_of_the_prompt_alone(model):
    inputs, cache = zoo.inputs("llava", model), DynamicCache()
    with METHODS["autoprune"](model) as trace:
        options = {"max_new_tokens": 4, "prompt_lookup_num_tokens": 2, "do_sample": False}
        model.generate(**inputs, past_key_values=cache, **options)
        cache.reset()
        expected = model(**inputs).logits
        close(model(**inputs, past_key_values=cache, logits_to_keep=4).logits, expected[:, -4:])
    assert len({(s.num_text, s.mutual_information) for s in trace.samples}) == 1


def test_a_picture_that_was_refused_is_not_scored_for_the_next_prompt(model):
    inputs, other = (zoo.inputs("llava", model, seed=seed) for seed in (0, 5))
    visual = zoo.visual_mask(model, inputs["input_ids"])
    with torch.no_grad():
        features = model.get_image_features(inputs["pixel_values"]).pooler_output
    states = model.get_input_embeddings()(inputs["input_ids"])
    flat = torch.cat(list(features)).reshape(-1, states.shape[-1])
    states = states.masked_scatter(visual[..., None].expand_as(states), flat)
    with METHODS["autoprune"](model, visual_mask=visual) as trace:
        expected = model(inputs_embeds=states).logits
        cache = model(**inputs, use_cache=True).past_key_values
        with pytest.raises(UnsupportedError, match="one prompt"):
            model(**other, past_key_values=cache)
        close(model(inputs_embeds=states).logits, expected)
    first, *_, last = trace.samples
    assert all(torch.equal(*pair) for pair in zip(first.kept, last.kept, strict=True))


@pytest.mark.parametrize("make", [growing, static])
def test_a_mask_for_a_whole_static_cache_hides_nothing_that_is_still_to_come(model, method, make):
    inputs = zoo.inputs("llava", model, "padded3")
    length = inputs["attention_mask"].shape[1]
    turns = [words(3, 3), words(3, 1, seed=1), words(3, 1, seed=2)]
    cache, end, given = make(model, length + 10), length, []
    with method(model) as trace:
        model(**inputs, past_key_values=cache)
        for said in turns:
            end += said.shape[1]
            mask = torch.zeros(3, length + 10 if make is static else end, dtype=torch.long)
            mask[:, :end] = 1
            mask[:, :length] = inputs["attention_mask"]
            position = torch.arange(end - said.shape[1], end)[None]
            given += [
                model(
                    input_ids=said,
                    attention_mask=mask,
                    past_key_values=cache,
                    position_ids=position,
                ).logits
            ]
    whole = oracle.append(model, inputs, torch.cat(turns, dim=1))
    whole["position_ids"] = torch.arange(end)[None]
    expected = oracle.oracle_forward(model, whole, columns_of(trace, inputs), method.positions)
    close(torch.cat(given, dim=1), expected[:, length:])


def test_a_mask_of_the_new_tokens_alone_is_refused(model, method):
    inputs, cache = zoo.inputs("llava", model), DynamicCache()
    with method(model):
        model(**inputs, past_key_values=cache)
        with pytest.raises(ValueError, match="attention_mask has 3 columns, but the cache and the"):
            model(
                input_ids=words(1, 3),
                attention_mask=torch.ones(1, 3, dtype=torch.long),
                past_key_values=cache,
            )


@pytest.mark.parametrize("make", [growing, static])
def test_generate_hides_what_a_later_turn_hides(model, method, make):
    """It makes the masks of static caches itself, in four dimensions."""
    inputs = zoo.inputs("llava", model, "padded3")
    length = inputs["attention_mask"].shape[1]
    options = {"do_sample": False, "disable_compile": True}
    logits = {"output_logits": True, "return_dict_in_generate": True}
    with method(model) as trace:
        cache = make(model, length + 20)
        first = model.generate(**inputs, past_key_values=cache, max_new_tokens=4, **options)
        more = torch.cat([first, words(3, 5)], dim=1)
        new = torch.ones(3, more.shape[1] - length, dtype=torch.long)
        new[0, 1:3] = 0
        mask = torch.cat([inputs["attention_mask"], new], dim=1)
        second = model.generate(
            input_ids=more, attention_mask=mask, past_key_values=cache, max_new_tokens=3,
            **options, **logits,
        )  # fmt: skip
    whole = oracle.append(model, inputs, more[:, length:])
    whole["attention_mask"] = mask
    # The prompt was numbered without padding, what follows goes on from there.
    position = (mask.cumsum(dim=1) - 1).clamp(min=0)
    expected = oracle.oracle_forward(
        model, whole | {"position_ids": position}, columns_of(trace, inputs), method.positions
    )
    close(second.logits[0][1:], expected[1:, -1])
    if method.positions == "original":
        close(second.logits[0], expected[:, -1])


@pytest.mark.skipif(growing not in RESETTABLE, reason="this release cannot empty a cache")
def test_drafts_of_a_later_turn_are_none_of_the_next_prompt(model):
    inputs, cache = zoo.inputs("llava", model), DynamicCache()
    with METHODS["autoprune"](model) as trace:
        ids = model.generate(**inputs, past_key_values=cache, max_new_tokens=2, do_sample=False)
        more = torch.cat([ids, words(1, 4)], dim=1)
        options = {"max_new_tokens": 3, "prompt_lookup_num_tokens": 2, "do_sample": False}
        model.generate(input_ids=more, past_key_values=cache, **options)
        cache.reset()
        model(**inputs, past_key_values=cache, logits_to_keep=4)
    assert len({(s.num_text, s.mutual_information) for s in trace.samples}) == 1


@pytest.mark.parametrize("name", ["llava", "paligemma"])
def test_compacted_positions_leave_a_prompt_alone_of_which_nothing_is_pruned(name):
    model = zoo.build(name)
    inputs = zoo.inputs(name, model)
    own = {"position_ids": 2 * torch.arange(inputs["input_ids"].shape[1])[None]}
    for options in ({}, own if name == "llava" else {}):
        expected = model(**inputs, **options).logits
        with AutoPrune(Budget.ratio(1.0), positions="compacted")(model):
            assert torch.equal(model(**inputs, **options).logits, expected)


AWAY = "this cache was pruned, and .*; go on in the context that pruned it, or before its handle"


@pytest.mark.parametrize("make", [growing, static])
def test_a_ragged_batch_outside_of_the_context_says_what_it_is(model, method, make):
    inputs = zoo.inputs("llava", model, "padded3")
    mask, said = inputs["attention_mask"], words(3, 1)
    mask = torch.cat([mask, torch.ones_like(said)], dim=1)
    for given in ({"attention_mask": mask}, {}):
        cache = make(model, mask.shape[1] + 4)
        with method(model):
            model(**inputs, past_key_values=cache)
        with pytest.raises(UnsupportedError, match=AWAY):
            model(input_ids=said, past_key_values=cache, **given)


def test_a_handle_that_is_detached_while_a_ragged_batch_is_generated_says_what_it_is(model):
    inputs, handle = zoo.inputs("llava", model, "padded3"), METHODS["deep"].attach(model)
    seen = []

    def detach(ids, scores):
        seen.append(ids.shape[1])
        if len(seen) == 3:
            handle.detach()
        return scores

    with pytest.raises(UnsupportedError, match="prompts have different lengths in it"):
        model.generate(**inputs, max_new_tokens=8, logits_processor=[detach], do_sample=False)
    assert len(seen) == 3


@pytest.mark.parametrize("name", ["autoprune", "deep", "pre_llm"])
@pytest.mark.parametrize("prompts", [1, 3])
def test_prompts_of_one_length_go_on_outside_of_the_context(model, name, prompts):
    inputs = zoo.inputs("llava", model)
    inputs = {key: value.repeat_interleave(prompts, dim=0) for key, value in inputs.items()}
    said = words(prompts, 1)
    with METHODS[name](model):
        cache = model(**inputs, use_cache=True).past_key_values
        expected = model(input_ids=said, past_key_values=copy.deepcopy(cache)).logits
    assert torch.equal(model(input_ids=said, past_key_values=cache).logits, expected)


def test_several_tokens_on_one_prompt_outside_of_the_context_say_what_they_are(model):
    inputs = zoo.inputs("llava", model)
    with METHODS["deep"](model):
        cache = model(**inputs, use_cache=True).past_key_values
    with pytest.raises(UnsupportedError, match="several new tokens at once need masks"):
        model(input_ids=words(1, 2), past_key_values=cache)


def test_a_static_cache_that_was_not_reset_says_so(model):
    first, second = (zoo.inputs("llava", model, seed=seed) for seed in (0, 1))
    cache = static(model, first["input_ids"].shape[1] + 4)
    with METHODS["autoprune"](model):
        model(**first, past_key_values=cache)
        length = first["input_ids"].shape[1]
        with pytest.raises(
            UnsupportedError, match=f"still holds {length} tokens .* call its reset"
        ):
            model(**second, past_key_values=cache)
        cache.reset()
        model(**second, past_key_values=cache)


def test_compacted_positions_outside_of_the_context_say_what_they_are(model):
    inputs = zoo.inputs("llava", model)
    handle = AutoPrune(Budget.ratio(0.4), positions="compacted").attach(model)
    with torch.no_grad():
        cache = model(**inputs, use_cache=True).past_key_values
        handle.detach()
        with pytest.raises(UnsupportedError, match="positions were numbered anew"):
            model(input_ids=words(1, 1), past_key_values=cache)
