"""Switching pruning on and off, and everything that is refused with one clear sentence."""

from __future__ import annotations

import json
import pickle
import threading

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache
from transformers.cache_utils import DynamicLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from autoprune import AutoPrune, AutoPruneReference, Budget
from autoprune.errors import UnsupportedError
from tests import zoo

METHOD = AutoPrune(Budget.ratio(0.5))


@pytest.fixture
def model():
    return zoo.build("llava", "sdpa")


@pytest.fixture
def inputs(model):
    batch = zoo.inputs("llava", model)
    logits_of(model, batch)  # transformers installs hooks of its own in the first forward
    return batch


def everything_in(model):
    """All that hooks and patches could have changed."""
    return {
        name: (
            list(module._forward_pre_hooks),
            list(module._forward_hooks),
            sorted(key for key in module.__dict__ if not key.startswith("_")),
        )
        for name, module in model.named_modules()
    } | {"attention": dict(ALL_ATTENTION_FUNCTIONS)}


def logits_of(model, inputs):
    with torch.no_grad():
        return model(**inputs).logits


def test_leaving_restores_the_model_bit_for_bit(model, inputs):
    plain = logits_of(model, inputs)
    before = everything_in(model)
    with METHOD(model):
        pruned = logits_of(model, inputs)
    assert everything_in(model) == before
    assert not torch.equal(pruned, plain)
    assert torch.equal(logits_of(model, inputs), plain)


def test_an_exception_inside_restores_the_model_too(model, inputs):
    before, plain = everything_in(model), logits_of(model, inputs)

    def fail():
        with METHOD(model):
            logits_of(model, inputs)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert everything_in(model) == before
    assert torch.equal(logits_of(model, inputs), plain)


def test_an_exception_inside_the_forward_does_not_poison_the_next_one(model, inputs):
    broken = dict(inputs, pixel_values=inputs["pixel_values"][..., :-1, :])
    with METHOD(model) as trace:
        expected = logits_of(model, inputs)
        with pytest.raises(ValueError, match="size"):
            logits_of(model, broken)
        assert torch.equal(logits_of(model, inputs), expected)
    assert len(trace.samples) == 2


def test_attach_and_detach_do_what_the_context_does(model, inputs):
    with METHOD(model):
        expected = logits_of(model, inputs)
    handle = METHOD.attach(model)
    assert torch.equal(logits_of(model, inputs), expected)
    handle.detach()
    handle.detach()
    assert not torch.equal(logits_of(model, inputs), expected)
    assert len(handle.trace.samples) == 1


def test_a_budget_of_everything_changes_nothing(model, inputs):
    plain = logits_of(model, inputs)
    total = int(zoo.visual_mask(model, inputs["input_ids"]).sum())
    for budget in (total, total + 100, Budget.ratio(1.0), Budget.flops(1.0)):
        with AutoPrune(budget)(model) as trace:
            assert torch.equal(logits_of(model, inputs), plain)
        assert trace.samples[0].tokens_per_layer == [total] * zoo.LAYERS


@pytest.mark.parametrize("again", [METHOD, AutoPruneReference(budget=4)])
def test_entering_twice_is_refused(model, inputs, again):
    with METHOD(model):
        expected = logits_of(model, inputs)
        with pytest.raises(UnsupportedError, match="being pruned already"), again(model):
            pass
        assert torch.equal(logits_of(model, inputs), expected)


def test_one_attachment_cannot_be_entered_twice_at_once(model):
    attachment = METHOD(model)
    with attachment, pytest.raises(UnsupportedError, match="being pruned already"):
        attachment.__enter__()


def test_training_mode_is_refused(model, inputs):
    with pytest.raises(UnsupportedError, match="eval"), METHOD(model.train()):
        pass
    with METHOD(model.eval()), pytest.raises(UnsupportedError, match="eval"):
        logits_of(model.train(), inputs)


def test_what_is_no_vision_language_model_is_refused():
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
    )
    with pytest.raises(UnsupportedError, match="has no image token id"):
        METHOD(LlamaForCausalLM(config))
    with pytest.raises(UnsupportedError, match="not a transformers model"):
        METHOD(torch.nn.Linear(2, 2))


def test_a_prompt_without_image_runs_as_it_is(model):
    ids = torch.tensor([[1, 5, 6, 7, 8]])
    plain = logits_of(model, {"input_ids": ids})
    with METHOD(model) as trace:
        assert torch.equal(logits_of(model, {"input_ids": ids}), plain)
    (sample,) = trace.samples
    assert (sample.num_visual, sample.num_text) == (0, 5)
    assert sample.tokens_per_layer == sample.schedule == [0] * zoo.LAYERS
    assert sample.mutual_information is None
    assert sample.flops == sample.flops_full > 0


def test_a_wrong_number_of_image_tokens_is_an_error_and_leaves_nothing(model, inputs):
    place = int(zoo.visual_mask(model, inputs["input_ids"])[0].nonzero()[0])
    broken = dict(inputs)
    for name in ("input_ids", "attention_mask"):
        value = inputs[name]
        broken[name] = torch.cat([value[:, :place], value[:, place + 1 :]], dim=1)
    before = everything_in(model)
    with METHOD(model) as trace, pytest.raises(ValueError, match="do not match"):
        logits_of(model, broken)
    assert everything_in(model) == before
    assert not trace.samples


def test_embeddings_need_a_visual_mask(model, inputs):
    ids = inputs["input_ids"]
    visual = zoo.visual_mask(model, ids)
    with torch.no_grad():
        embeds = model.get_input_embeddings()(ids)
        features = model.get_image_features(inputs["pixel_values"]).pooler_output
        embeds[visual] = torch.cat(list(features))
    with METHOD(model), pytest.raises(UnsupportedError, match="visual_mask"):
        logits_of(model, {"inputs_embeds": embeds})
    wrong = visual[:, :-1]
    with METHOD(model, visual_mask=wrong), pytest.raises(ValueError, match="visual_mask has shape"):
        logits_of(model, {"inputs_embeds": embeds})
    with METHOD(model) as trace:
        expected = logits_of(model, inputs)
    scores = cls_attention(model, inputs["pixel_values"])
    with METHOD(model, visual_mask=visual, vision_scores=scores) as again:
        torch.testing.assert_close(logits_of(model, {"inputs_embeds": embeds}), expected)
    assert [s.tokens_per_layer for s in again.samples] == [
        s.tokens_per_layer for s in trace.samples
    ]


def cls_attention(model, pixels):
    """The vision tower's scores, read from its own attention weights."""
    tower = model.base_model.vision_tower
    tower.set_attn_implementation("eager")
    with torch.no_grad():
        attentions = tower(pixels, output_attentions=True).attentions
    tower.set_attn_implementation("sdpa")
    return attentions[model.config.vision_feature_layer][:, :, 0, 1:].mean(dim=1).flatten()


def test_wrong_vision_scores_are_refused(model, inputs):
    scores = torch.rand(7)
    with METHOD(model, vision_scores=scores), pytest.raises(ValueError, match="7 entries"):
        logits_of(model, inputs)


def test_methods_refuse_models_they_cannot_work_on(model):
    with pytest.raises(ValueError, match="mi_layer is 5, but the model has 6 layers"):
        AutoPrune(4, mi_layer=5)(model)


def test_an_infeasible_budget_names_the_way_out(model, inputs):
    with AutoPrune(1)(model), pytest.raises(ValueError, match=r"first_cut=\"pre_llm\""):
        logits_of(model, inputs)
    with AutoPrune(1, first_cut="pre_llm")(model) as trace:
        logits_of(model, inputs)
    assert trace.samples[0].tokens_per_layer == [1] * zoo.LAYERS


def test_new_images_on_a_filled_cache_are_refused(model, inputs):
    with torch.no_grad(), METHOD(model):
        cache = model(**inputs, use_cache=True).past_key_values
        with pytest.raises(UnsupportedError, match="new images"):
            model(**inputs, past_key_values=cache)


def test_two_threads_do_not_see_each_other(model):
    batches = [zoo.inputs("llava", model, seed=seed) for seed in range(2)]
    with METHOD(model):
        expected = [logits_of(model, batch) for batch in batches]
    results: dict[int, list[torch.Tensor]] = {0: [], 1: []}

    def work(which: int) -> None:
        for _ in range(10):
            results[which].append(logits_of(model, batches[which]))

    with METHOD(model) as trace:
        threads = [threading.Thread(target=work, args=(which,)) for which in results]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(trace.samples) == 20
    for which, logits in results.items():
        assert all(torch.equal(value, expected[which]) for value in logits)


def test_two_models_can_be_pruned_at_once_and_left_in_any_order(inputs):
    first, second = zoo.build("llava", "sdpa"), zoo.build("llava", "eager", seed=1)
    plain = [logits_of(model, inputs) for model in (first, second)]
    functions = dict(ALL_ATTENTION_FUNCTIONS)
    one, two = METHOD.attach(first), AutoPrune(Budget.ratio(0.3)).attach(second)
    logits_of(first, inputs), logits_of(second, inputs)
    one.detach()
    assert torch.equal(logits_of(first, inputs), plain[0])
    assert not torch.equal(logits_of(second, inputs), plain[1])
    two.detach()
    assert torch.equal(logits_of(second, inputs), plain[1])
    assert dict(ALL_ATTENTION_FUNCTIONS) == functions
    assert [len(one.trace.samples), len(two.trace.samples)] == [1, 2]


def test_a_users_own_attention_function_is_back_afterwards(inputs, monkeypatch):
    sdpa, calls = ALL_ATTENTION_FUNCTIONS["sdpa"], []

    def counting(*args, **kwargs):
        calls.append(args[0])
        return sdpa(*args, **kwargs)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._local_mapping, "sdpa", counting)
    first, second = zoo.build("llava", "sdpa"), zoo.build("llava", "sdpa", seed=1)
    logits_of(first, inputs)
    each = len(calls)
    # The last of two models to leave restores it, and while they are pruned it computes their attention.
    one, two = METHOD.attach(first), METHOD.attach(second)
    logits_of(first, inputs)
    one.detach()
    two.detach()
    assert len(calls) == 2 * each > 0
    assert ALL_ATTENTION_FUNCTIONS._local_mapping["sdpa"] is counting
    logits_of(first, inputs)
    assert len(calls) == 3 * each


def test_a_trace_is_read_by_several_threads_at_once(model, inputs):
    with METHOD(model) as trace, torch.no_grad():
        for _ in range(30):
            model(**inputs)
    start, counts = threading.Barrier(6), []

    def read():
        start.wait()
        counts.append(len(trace.samples))

    readers = [threading.Thread(target=read) for _ in range(6)]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join()
    assert counts == [30 * len(inputs["input_ids"])] * 6
    assert pickle.loads(pickle.dumps(trace)).summary() == trace.summary()


def test_the_trace_can_be_written_and_read(model, inputs, tmp_path):
    with METHOD(model) as trace:
        logits_of(model, inputs)
    trace.to_json(tmp_path / "trace.json")
    record = json.loads((tmp_path / "trace.json").read_text())
    (sample,) = record["samples"]
    assert sample["tokens_per_layer"] == trace.samples[0].tokens_per_layer
    assert record["summary"]["mean_tokens"] == trace.summary().mean_tokens
    with pytest.raises(FileNotFoundError):
        trace.to_json(tmp_path / "missing" / "trace.json")
    assert [path.name for path in tmp_path.iterdir()] == ["trace.json"]


# Older releases of transformers only zero a dynamic cache, which then keeps its length.
RESETTABLE = [StaticCache] + [DynamicCache] * ("reset" in vars(DynamicLayer))


@pytest.mark.parametrize("kind", RESETTABLE)
@pytest.mark.parametrize("first_cut", ["after_layer_0", "pre_llm"])
def test_a_cache_can_be_used_again_after_a_reset(model, inputs, kind, first_cut):
    config = model.config.get_text_config()
    options = {"max_cache_len": 64} if kind is StaticCache else {}
    text = torch.tensor([[1, 5, 6, 7, 8]])

    def converse(cache):
        """Logits of a text-only prompt and of one more token."""
        with torch.no_grad():
            prompt = model(input_ids=text, past_key_values=cache).logits
            step = model(input_ids=text[:, :1], past_key_values=cache).logits
        return torch.cat([prompt, step], dim=1)

    expected = converse(kind(config=config, **options))
    cache = kind(config=config, **options)
    with torch.no_grad(), AutoPrune(Budget.ratio(0.5), first_cut=first_cut)(model):
        model(**inputs, past_key_values=cache)
        cache.reset()
        torch.testing.assert_close(converse(cache), expected, atol=1e-5, rtol=0)
    cache.reset()
    torch.testing.assert_close(converse(cache), expected, atol=1e-5, rtol=0)


def test_what_the_user_put_on_the_model_is_there_again_afterwards(model):
    own = {name: getattr(model, name) for name in ("_prefill", "_get_candidate_generator")}
    for name, method in own.items():
        setattr(model, name, method)
    METHOD.attach(model).detach()
    assert {name: model.__dict__[name] for name in own} == own
