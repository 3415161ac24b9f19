"""Every way to generate, judged by the oracle: only the dropped tokens may make a difference."""

from __future__ import annotations

import functools
import itertools
import threading

import pytest
import torch
import torch.nn.functional as F
import transformers

from autoprune import AutoPrune, Budget
from autoprune.engine.cache import columns as cache_columns
from autoprune.engine.cache.pruned import LayerMemory
from tests import oracle, zoo
from tests.scattered import DEEP, PRE_LLM, Scattered

METHODS = {
    "autoprune": AutoPrune(budget=Budget.ratio(0.5)),
    "deep": Scattered(DEEP),
    "pre_llm": Scattered(PRE_LLM),
    "peek": AutoPrune(Budget.ratio(0.3), first_cut="peek"),
}
model_of = functools.cache(zoo.build)
close = functools.partial(torch.testing.assert_close, atol=2e-4, rtol=0)


@pytest.fixture(params=zoo.EVERY_MODE)
def name(request):
    return request.param


@pytest.fixture
def model(name):
    return model_of(name, "sdpa")


@pytest.fixture(params=METHODS)
def method(request):
    return METHODS[request.param]


def columns_of(trace, inputs):
    """The kept columns of a generation's first forward; copies of a prompt (beams) must agree."""
    mask = inputs["attention_mask"]
    copies = len(trace.samples) // len(mask)
    mask = mask.repeat_interleave(copies, dim=0)
    columns = oracle.columns_from_trace(trace.samples, mask, zoo.LAYERS)
    for kept in columns:
        assert torch.equal(kept, kept[::copies].repeat_interleave(copies, dim=0))
    return [kept[::copies] for kept in columns]


def both(model, inputs, method, seed=0, **options):
    """The same generation twice: pruned on a cache, and plain with the dropped tokens hidden."""
    options |= {
        "max_new_tokens": 5,
        "output_logits": True,
        "output_scores": True,
        "return_dict_in_generate": True,
    }
    torch.manual_seed(seed)
    with method(model) as trace:
        pruned = model.generate(**inputs, **options)
    columns = columns_of(trace, inputs)
    torch.manual_seed(seed)
    with oracle.hiding(model, columns):
        expected = model.generate(**inputs, **options, use_cache=False)
    assert any((kept != columns[0]).any() for kept in columns) or not columns[0].all()
    return pruned, expected


def new_tokens(*shape, seed=0):
    return torch.randint(10, 100, shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("batch", ["single", "padded3"])
def test_greedy_equals_a_manual_loop_that_takes_the_best_token(name, model, method, batch):
    inputs = zoo.inputs(name, model, batch)
    with method(model):
        _, tokens = oracle.generate_logits(model, inputs, steps=5)
        conversation = oracle.Conversation(model, inputs)
        by_hand = [conversation.logits[:, -1].argmax(dim=-1)]
        for _ in range(5):
            by_hand.append(conversation.feed(by_hand[-1][:, None])[:, -1].argmax(dim=-1))
    assert torch.equal(torch.stack(by_hand, dim=1), tokens)


@pytest.mark.parametrize("cache", [transformers.DynamicCache, "model's own"])
def test_plain_forwards_work_with_a_given_cache_and_with_none(name, model, method, cache):
    inputs = zoo.inputs(name, model, "padded3_text")
    given = None if isinstance(cache, str) else cache(config=model.config)
    tokens = new_tokens(3, 3)
    with method(model) as trace:
        actual = oracle.manual_logits(model, inputs, tokens, given)
    close(actual, oracle.oracle_logits(model, inputs, columns_of(trace, inputs), tokens))


@pytest.mark.parametrize("batch", ["padded3", "padded3_text"])
@pytest.mark.parametrize("copies", [1, 2])
def test_sampling_draws_the_same_tokens(name, model, method, copies, batch):
    if copies > 1 and batch == "padded3" and not zoo.SINCE_5_19:
        pytest.skip("this transformers mixes up the pictures of a copied prompt that holds two")
    inputs = zoo.inputs(name, model, batch)
    options = {"do_sample": True, "temperature": 2.0, "top_k": 20, "num_return_sequences": copies}
    pruned, expected = both(model, inputs, method, seed=3, **options)
    assert torch.equal(pruned.sequences, expected.sequences)
    close(torch.stack(pruned.logits), torch.stack(expected.logits))


@pytest.mark.parametrize("batch", ["single", "padded3_text"])
def test_beam_search_finds_the_same_beams(name, model, method, batch):
    inputs = zoo.inputs(name, model, batch)
    options = {"do_sample": False, "num_beams": 3, "num_return_sequences": 2}
    pruned, expected = both(model, inputs, method, **options)
    assert torch.equal(pruned.sequences, expected.sequences)
    close(pruned.sequences_scores, expected.sequences_scores)


@pytest.mark.parametrize("batch", ["single", "padded3"])
def test_a_static_cache_gives_the_same_logits(name, model, method, batch):
    inputs = zoo.inputs(name, model, batch)
    with method(model) as trace:
        actual, tokens = oracle.generate_logits(
            model, inputs, steps=3, cache_implementation="static", disable_compile=True
        )
    close(actual, oracle.oracle_logits(model, inputs, columns_of(trace, inputs), tokens[:, :3]))


def test_without_a_cache_every_step_prunes_the_grown_prompt_anew(name, model, method):
    inputs = zoo.inputs(name, model, "padded3")
    with method(model) as trace:
        actual, tokens = oracle.generate_logits(model, inputs, steps=3, use_cache=False)
    assert len(trace.samples) == 4 * 3
    for step in range(4):
        grown = oracle.append(model, inputs, tokens[:, :step])
        samples = trace.samples[3 * step : 3 * step + 3]
        columns = oracle.columns_from_trace(samples, grown["attention_mask"], zoo.LAYERS)
        close(actual[:, step], oracle.oracle_forward(model, grown, columns)[:, -1])


@pytest.mark.parametrize(
    "method", [METHODS["autoprune"], METHODS["deep"]], ids=["autoprune", "deep"]
)
def test_prompt_lookup_accepts_drafts_and_changes_nothing(name, model, method):
    accepted, seed = False, 0
    while not accepted:
        assert seed < 40, "no draft was ever accepted"
        inputs = zoo.inputs(name, model, "single", seed=seed)
        lengths = []
        hook = (
            model.get_decoder()
            .layers[0]
            .register_forward_pre_hook(
                lambda _, args, lengths=lengths: lengths.append(args[0].shape[1])
            )
        )
        with hook, method(model) as trace:
            drafted = model.generate(
                **inputs, max_new_tokens=8, do_sample=False, prompt_lookup_num_tokens=3
            )
        assert len(trace.samples) == 1
        with method(model):
            _, tokens = oracle.generate_logits(model, inputs, steps=7)
        assert torch.equal(drafted[:, inputs["input_ids"].shape[1] :], tokens)
        accepted, seed = len(lengths) < 8, seed + 1


@pytest.mark.parametrize("padded", [False, True])
def test_drafts_of_prompt_lookup_are_no_part_of_the_prompt(padded):
    """The prompt repeats itself, so that drafts come with its first forward."""
    model = model_of("llava", "sdpa")
    inputs = zoo.inputs("llava", model, "single")
    ids = inputs["input_ids"]
    inputs["input_ids"] = torch.cat([ids, ids[:, -4:], ids[:, -4:-2]], dim=1)
    if padded:
        inputs["input_ids"] = torch.nn.functional.pad(inputs["input_ids"], (2, 0), value=zoo.PAD)
    inputs["attention_mask"] = (inputs["input_ids"] != zoo.PAD).long()
    lengths = []
    hook = model.get_decoder().register_forward_pre_hook(
        lambda _, args, kwargs: lengths.append(kwargs["inputs_embeds"].shape[1]), with_kwargs=True
    )
    options = {"max_new_tokens": 3, "do_sample": False}
    with hook, AutoPrune(Budget.flops(0.8))(model) as trace:
        drafted = model.generate(**inputs, prompt_lookup_num_tokens=2, **options)
        first = lengths[0]
        greedy = model.generate(**inputs, **options)
    assert first > inputs["input_ids"].shape[1], "drafts came with the prompt"
    assert torch.equal(drafted, greedy)
    looked, plain = trace.samples
    visual = int(zoo.visual_mask(model, inputs["input_ids"]).sum())
    assert looked.num_text == plain.num_text == int(inputs["attention_mask"].sum()) - visual
    assert looked.tokens_per_layer == plain.tokens_per_layer
    assert (looked.flops, looked.kv_bytes) == (plain.flops, plain.kv_bytes)


@pytest.mark.skipif(
    not zoo.SINCE_5_19, reason="this transformers hands the pixels to the text-only assistant"
)
def test_assisted_decoding_changes_nothing(method):
    model = model_of("llava", "sdpa")
    inputs = zoo.inputs("llava", model, "single")
    with method(model) as trace:
        _, tokens = oracle.generate_logits(model, inputs, steps=5)
        assisted = model.generate(
            **inputs, max_new_tokens=6, do_sample=False, assistant_model=assistant()
        )
    assert torch.equal(assisted[:, inputs["input_ids"].shape[1] :], tokens)
    greedy, drafted = trace.samples
    assert [k.tolist() for k in greedy.kept] == [k.tolist() for k in drafted.kept]


@pytest.mark.parametrize("batch", ["single", "padded3", "padded3_text"])
def test_a_text_only_second_turn_sees_what_the_first_one_left(name, model, method, batch):
    inputs = zoo.inputs(name, model, batch)
    rows = len(inputs["input_ids"])
    first, second, third = (new_tokens(rows, size, seed=size) for size in (2, 5, 1))
    with method(model) as trace:
        conversation = oracle.Conversation(model, inputs)
        actual = [conversation.feed(turn) for turn in (first, second, third)]
    assert len(trace.samples) == rows
    spoken = torch.cat([first, second, third], dim=1)
    expected = oracle.oracle_logits(model, inputs, columns_of(trace, inputs), spoken)
    close(torch.cat(actual, dim=1), expected[:, 1:])


def test_generate_continues_on_a_pruned_cache(name, model, method):
    inputs = zoo.inputs(name, model, "padded3")
    with method(model) as trace:
        first = model.generate(
            **inputs, max_new_tokens=3, do_sample=False, return_dict_in_generate=True
        )
        grown = torch.cat([first.sequences, new_tokens(3, 4)], dim=1)
        spoken = grown[:, inputs["input_ids"].shape[1] :]
        text = oracle.append(model, inputs, spoken)
        text = {key: text[key] for key in ("input_ids", "attention_mask")}
        actual, tokens = oracle.generate_logits(
            model, text, steps=2, past_key_values=first.past_key_values
        )
    assert len(trace.samples) == 3
    said = torch.cat([spoken, tokens[:, :2]], dim=1)
    expected = oracle.oracle_logits(model, inputs, columns_of(trace, inputs), said)
    close(actual, expected[:, -3:])


@pytest.mark.parametrize("side", ["left", "right"])
def test_labels_keep_their_places_in_a_padded_forward(name, model, method, side):
    inputs = zoo.inputs(name, model, "padded3", padding_side=side)
    silent = zoo.visual_mask(model, inputs["input_ids"]) | (inputs["attention_mask"] == 0)
    # The last visual token predicts the first word behind the picture, and may be gone.
    behind = F.pad(silent, (1, 0))[:, :-1]
    labels = inputs["input_ids"].masked_fill(silent | behind, -100)
    with method(model) as trace, torch.no_grad():
        out = model(**inputs, labels=labels)
    expected = oracle.oracle_forward(model, inputs, columns_of(trace, inputs))
    loss = F.cross_entropy(expected[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    assert out.logits.shape == expected.shape
    close(out.loss, loss)
    close(out.logits[~silent], expected[~silent])


def test_interleaved_generations_do_not_see_each_other(name, model, method):
    prompts = [
        zoo.inputs(name, model, batch, seed=seed)
        for seed, batch in enumerate(("padded3", "single", "padded3_text"))
    ]
    said = [new_tokens(len(p["input_ids"]), 3, seed=i) for i, p in enumerate(prompts)]
    with method(model) as trace:
        conversations = [oracle.Conversation(model, prompt) for prompt in prompts]
        logits = [[c.logits[:, -1]] for c in conversations]
        for step in range(3):
            for conversation, tokens, rows in zip(conversations, said, logits, strict=True):
                rows.append(conversation.feed(tokens[:, step : step + 1])[:, -1])
    samples = iter(trace.samples)
    for prompt, tokens, rows in zip(prompts, said, logits, strict=True):
        own = [next(samples) for _ in prompt["input_ids"]]
        columns = oracle.columns_from_trace(own, prompt["attention_mask"], zoo.LAYERS)
        expected = oracle.oracle_logits(model, prompt, columns, tokens)
        close(torch.stack(rows, dim=1), expected)


def test_threads_do_not_see_each_other(method):
    model = model_of("llava", "sdpa")
    batches = [zoo.inputs("llava", model, "padded3", seed=seed) for seed in range(4)]
    with method(model):
        alone = [oracle.generate_logits(model, batch, steps=6)[0] for batch in batches]
        together, failures = [None] * len(batches), []

        def work(place):
            try:
                for _ in range(3):
                    together[place] = oracle.generate_logits(model, batches[place], steps=6)[0]
            except Exception as error:
                failures.append(error)

        threads = [threading.Thread(target=work, args=(place,)) for place in range(len(batches))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not failures
    for first, second in zip(alone, together, strict=True):
        close(first, second)


def test_two_models_are_pruned_side_by_side(method):
    names = ["llava", "qwen2_5_vl"]
    models = [model_of(name, "sdpa") for name in names]
    inputs = [zoo.inputs(n, m, "padded3") for n, m in zip(names, models, strict=True)]
    with method(models[0]) as first, method(models[1]) as second:
        turns = [oracle.Conversation(m, x) for m, x in zip(models, inputs, strict=True)]
        actual = [turn.feed(new_tokens(3, 2)) for turn in turns]
    for model, batch, trace, logits in zip(models, inputs, (first, second), actual, strict=True):
        expected = oracle.oracle_logits(model, batch, columns_of(trace, batch), new_tokens(3, 2))
        close(logits, expected[:, 1:])


def test_an_exception_leaves_the_plain_model(name, model, method):
    inputs = zoo.inputs(name, model, "padded3")
    before = oracle.plain_logits(model, inputs)
    layer = model.get_decoder().layers[3]

    def fail(*_):
        raise RuntimeError("out of memory")

    hook = layer.register_forward_hook(fail)
    with hook, pytest.raises(RuntimeError, match="out of memory"), method(model):
        model(**inputs)
    assert torch.equal(oracle.plain_logits(model, inputs), before)
    with method(model) as trace:  # and it can be pruned again
        actual = oracle.manual_logits(model, inputs, new_tokens(3, 1))
    close(actual, oracle.oracle_logits(model, inputs, columns_of(trace, inputs), new_tokens(3, 1)))


@functools.cache
def assistant():
    """A small text model with the same vocabulary."""
    config = transformers.LlamaConfig(
        vocab_size=zoo.VOCABULARY,
        hidden_size=zoo.HIDDEN,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=zoo.HEADS,
        pad_token_id=zoo.PAD,
        bos_token_id=zoo.BOS,
        eos_token_id=None,
    )
    model = transformers.LlamaForCausalLM._from_config(config)
    zoo.randomise(model, seed=1)
    model.generation_config = transformers.GenerationConfig(
        pad_token_id=zoo.PAD, num_assistant_tokens=3
    )
    return model.eval()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_masks_of_a_ragged_batch_are_made_for_many_steps(attention, monkeypatch):
    monkeypatch.setattr(cache_columns, "ROOM", 2)
    model = model_of("llava", attention)
    inputs = zoo.inputs("llava", model, "padded3")
    tokens = torch.randint(10, 100, (3, 9), generator=torch.Generator().manual_seed(0))
    with METHODS["deep"](model) as trace:
        conversation = oracle.Conversation(model, inputs)
        logits, made = [conversation.logits[:, -1:]], []
        for step in range(tokens.shape[1]):
            logits.append(conversation.feed(tokens[:, step : step + 1]))
            (held,) = {LayerMemory.of(layer).held for layer in conversation.cache.layers}
            made.append({dtype: id(masks) for dtype, masks in held._masks.items()})
    columns = oracle.columns_from_trace(trace.samples, inputs["attention_mask"], zoo.LAYERS)
    close(torch.cat(logits, dim=1), oracle.oracle_logits(model, inputs, columns, tokens))
    assert made[0]
    changes = sum(before != after for before, after in itertools.pairwise(made))
    assert 1 <= changes <= 3
