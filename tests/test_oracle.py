"""The oracle judges the engine; this judges the oracle, without the engine."""

from __future__ import annotations

import functools
from types import SimpleNamespace

import pytest
import torch

from autoprune.engine.cache.argument import without_cache
from tests import oracle, zoo

CASES = [(name, media) for name, family in zoo.FAMILIES.items() for media in family.media]
model_of = functools.cache(zoo.build)


def everything(batch, layers=zoo.LAYERS):
    return [batch["attention_mask"].bool()] * layers


def dropping(model, batch, layer, seed=0, share=0.5):
    """Drop a random share of the visual tokens on entering `layer`; bool [batch, length]."""
    generator = torch.Generator().manual_seed(seed)
    visual = zoo.visual_mask(model, batch["input_ids"])
    drop = visual & (torch.rand(visual.shape, generator=generator) < share)
    kept = ~drop
    whole = torch.ones_like(kept)
    return [whole if index < layer else kept for index in range(zoo.LAYERS)]


def record_calls(model, batch):
    """The hidden states that enter layer 0 and the arguments that every layer is called with."""
    calls, hooks = [], []
    for layer in model.get_decoder().layers:
        hooks.append(
            layer.register_forward_pre_hook(
                lambda _, args, kwargs: calls.append((args[0], kwargs)), with_kwargs=True
            )
        )
    with torch.no_grad():
        model(**batch, use_cache=False)
    for hook in hooks:
        hook.remove()
    return calls[0][0], [kwargs for _, kwargs in calls]


def sliced(kwargs, keep):
    """A layer's arguments for the tokens in `keep` alone."""
    mask = kwargs["attention_mask"][..., keep, :][..., keep]
    cos_sin = tuple(part[..., keep, :] for part in kwargs["position_embeddings"])
    positions = kwargs["position_ids"]
    positions = None if positions is None else positions[..., keep]
    changed = {"attention_mask": mask, "position_embeddings": cos_sin, "position_ids": positions}
    return {**without_cache(kwargs), **changed}


@pytest.mark.parametrize("batch", ["single", "padded3", "padded3_text"])
@pytest.mark.parametrize(("name", "media"), CASES)
def test_with_nothing_dropped_the_oracle_is_the_plain_model(name, media, batch):
    model = model_of(name, "eager")
    arguments = zoo.inputs(name, model, batch, media)
    expected = oracle.plain_logits(model, arguments)
    actual = oracle.oracle_logits(model, arguments, everything(arguments))
    assert torch.equal(actual, expected)


@pytest.mark.parametrize(("name", "media"), CASES)
def test_recomputing_equals_cached_decoding(name, media):
    model = model_of(name, zoo.FAMILIES[name].attentions[0])
    arguments = zoo.inputs(name, model, "padded3_text", media)
    logits, tokens = oracle.generate_logits(model, arguments, steps=3)
    by_hand = oracle.manual_logits(model, arguments, tokens[:, :3])
    expected = oracle.oracle_logits(model, arguments, everything(arguments), tokens[:, :3])
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(by_hand, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize(("name", "media"), CASES)
def test_dropping_visual_tokens_changes_the_logits_a_lot(name, media):
    model = model_of(name, "eager")
    arguments = zoo.inputs(name, model, "padded3", media)
    plain = oracle.plain_logits(model, arguments)
    hidden = oracle.oracle_logits(model, arguments, dropping(model, arguments, layer=1))
    assert (hidden - plain).abs().amax(dim=(1, 2)).min() > 1.0


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "internvl", "mistral3"])
def test_hiding_from_layer_0_equals_removing_from_the_input(name):
    model = model_of(name, "eager")
    batch = zoo.inputs(name, model, "single")
    columns = dropping(model, batch, layer=0)
    keep = columns[0][0].nonzero().squeeze(1)
    seen = {}
    hook = model.get_decoder().register_forward_pre_hook(
        lambda _, args, kwargs: seen.update(kwargs), with_kwargs=True
    )
    oracle.plain_logits(model, batch)
    hook.remove()
    embeds, positions = seen["inputs_embeds"], seen["position_ids"]
    if positions is None:
        positions = torch.arange(embeds.shape[1])[None]
    with torch.no_grad():
        out = model.get_decoder()(
            inputs_embeds=embeds[:, keep],
            position_ids=positions[..., keep],
            attention_mask=torch.ones(1, len(keep), dtype=torch.long),
            use_cache=False,
        )
        removed = model.get_output_embeddings()(out.last_hidden_state[:, -1])
    hidden = oracle.oracle_logits(model, batch, columns)[:, 0]
    assert len(keep) < embeds.shape[1]
    torch.testing.assert_close(hidden, removed, atol=2e-5, rtol=0)


@pytest.mark.parametrize("name", ["llava", "internvl"])
def test_compacted_positions_equal_a_shorter_input(name):
    model = model_of(name, "eager")
    batch = zoo.inputs(name, model, "single")
    columns = dropping(model, batch, layer=0)
    keep = columns[0][0].nonzero().squeeze(1)
    embeds, _ = record_calls(model, batch)
    with torch.no_grad():
        out = model.get_decoder()(inputs_embeds=embeds[:, keep], use_cache=False)
        removed = model.get_output_embeddings()(out.last_hidden_state[:, -1])
    compacted = oracle.oracle_logits(model, batch, columns, positions="compacted")[:, 0]
    original = oracle.oracle_logits(model, batch, columns)[:, 0]
    torch.testing.assert_close(compacted, removed, atol=2e-5, rtol=0)
    assert (compacted - original).abs().max() > 0.1


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "gemma3", "paligemma"])
@pytest.mark.parametrize("cut", [2, 3])
def test_hiding_equals_slicing_layer_by_layer(name, cut):
    model = model_of(name, "eager")
    batch = zoo.inputs(name, model, "single")
    columns = dropping(model, batch, layer=cut)
    keep = columns[-1][0].nonzero().squeeze(1)
    hidden, calls = record_calls(model, batch)
    decoder = model.get_decoder()
    with torch.no_grad():
        for index, (layer, kwargs) in enumerate(zip(decoder.layers, calls, strict=True)):
            if index == cut:
                hidden = hidden[:, keep]
            tokens = keep if index >= cut else torch.arange(hidden.shape[1])
            hidden = layer(hidden, **sliced(kwargs, tokens))
        expected = model.get_output_embeddings()(decoder.norm(hidden)[:, -1])
    actual = oracle.oracle_logits(model, batch, columns)[:, 0]
    torch.testing.assert_close(actual, expected, atol=2e-5, rtol=0)


def test_padding_does_not_change_what_a_prompt_gets():
    model = model_of("llava", "eager")
    batch = zoo.inputs("llava", model, "padded3")
    columns = dropping(model, batch, layer=2)
    together = oracle.oracle_logits(model, batch, columns)
    for row in range(3):
        real = batch["attention_mask"][row].bool()
        alone = zoo.inputs("llava", model, "padded3", only=row)
        own = [kept[row : row + 1, real] for kept in columns]
        expected = oracle.oracle_logits(model, alone, own)
        torch.testing.assert_close(together[row : row + 1], expected, atol=5e-5, rtol=0)


@pytest.mark.parametrize("side", ["left", "right"])
def test_columns_of_a_trace_skip_the_padding(side):
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])
    if side == "right":
        mask[1] = mask[1].flip(0)
    first = SimpleNamespace(
        visual_positions=torch.tensor([1, 2, 3]),
        kept=[torch.tensor([0, 1, 2]), torch.tensor([0, 2])],
    )
    second = SimpleNamespace(
        visual_positions=torch.tensor([1]),
        kept=[torch.tensor([0]), torch.tensor([], dtype=torch.long)],
    )
    entering_0, entering_1 = oracle.columns_from_trace([first, second], mask, num_layers=2)
    assert torch.equal(entering_0, mask.bool())
    assert entering_1[0].tolist() == [True, True, False, True, True]
    place = 3 if side == "left" else 1
    expected = mask[1].bool()
    expected[place] = False
    assert torch.equal(entering_1[1], expected)


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_generation_without_a_cache_can_be_hidden_from_too(name):
    model = model_of(name, "sdpa")
    batch = zoo.inputs(name, model, "padded3")
    columns = dropping(model, batch, layer=2)
    with oracle.hiding(model, columns):
        logits, tokens = oracle.generate_logits(model, batch, steps=2, use_cache=False)
    expected = oracle.oracle_logits(model, batch, columns, tokens[:, :2])
    torch.testing.assert_close(logits, expected, atol=5e-5, rtol=0)


def test_tokens_cannot_come_back():
    model = model_of("llava", "eager")
    batch = zoo.inputs("llava", model, "single")
    columns = dropping(model, batch, layer=1)
    with pytest.raises(ValueError, match="come back"):
        oracle.oracle_logits(model, batch, columns[::-1])


def test_the_model_is_left_as_it_was():
    model = zoo.build("llava", "sdpa")
    batch = zoo.inputs("llava", model, "single")
    before = oracle.plain_logits(model, batch)
    oracle.oracle_logits(model, batch, dropping(model, batch, layer=1))
    assert torch.equal(oracle.plain_logits(model, batch), before)
    assert not any(module._forward_pre_hooks for module in model.modules())
