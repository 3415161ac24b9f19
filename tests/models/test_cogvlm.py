"""CogVLM's forward against plain loops, its cache and batches against itself, and faults that must show."""

from __future__ import annotations

import functools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from autoprune import AutoPrune, Budget, create
from autoprune.engine.attention.arguments import LayerArguments
from autoprune.errors import UnsupportedError
from autoprune.models.cogvlm import CogVLMConfig
from autoprune.models.cogvlm.convert import published_name
from autoprune.models.cogvlm.decoder import CogVLMRMSNorm, Route
from autoprune.models.cogvlm.prompt_tokens import PictureTokens
from tests import oracle, zoo
from tests.models.cogvlm_by_hand import TEXT, VISUAL, ByHand, Sizes, expert_of, positions_of
from tests.scattered import DEEP, Scattered

TOLERANCE = 2e-4
SIZES = Sizes(zoo.HEADS, zoo.LAYERS, tower_heads=2, tower_layers=3, patch=14)
model_of = functools.cache(functools.partial(zoo.build, "cogvlm"))
IMAGE, BOI, EOI = zoo.IMAGE, 132, 133
SHOWN = [BOI, *[IMAGE] * 16, EOI]


def by_hand(model) -> ByHand:
    tensors = {published_name(name): tensor for name, tensor in model.state_dict().items()}
    return ByHand({name: tensor.detach() for name, tensor in tensors.items()}, SIZES)


def alone(prompt, pixels) -> dict[str, torch.Tensor]:
    """Arguments for one prompt, in which "picture" stands for the ids of one."""
    ids = [i for token in prompt for i in (SHOWN if token == "picture" else [token])]
    found = {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids)).long()}
    return found | ({"pixel_values": pixels[None]} if "picture" in prompt else {})


PROMPTS = {
    "as published": [zoo.BOS, "picture", 5, 6, 7, 8],
    "text in front": [zoo.BOS, 9, 10, "picture", 11],
    "picture last": [zoo.BOS, "picture"],
    "text only": [zoo.BOS, 5, 6, 7, 8],
}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("prompt", PROMPTS.values(), ids=PROMPTS)
def test_logits_equal_plain_loops_over_the_tokens(prompt, attention):
    model = model_of(attention)
    pixels = torch.randn(3, 56, 56, generator=torch.Generator().manual_seed(1))
    expected = by_hand(model).logits(prompt, pixels)
    with torch.no_grad():
        actual = model(**alone(prompt, pixels)).logits[0]
    assert expected.std() > 2
    torch.testing.assert_close(actual, expected, atol=TOLERANCE, rtol=0)


@st.composite
def prompts(draw):
    """Ids and types of a prompt of text and pictures of different sizes, padded on the left."""
    ids, types = [], []
    for _ in range(draw(st.integers(1, 3))):
        text = draw(st.integers(1, 4))
        ids, types = ids + [5] * text, types + [TEXT] * text
        if draw(st.booleans()):
            patches = draw(st.integers(1, 5))
            ids, types = [*ids, BOI, *[IMAGE] * patches, EOI], types + [VISUAL] * (patches + 2)
    text = draw(st.integers(0 if types[-1] == TEXT else 1, 3))
    return ids + [5] * text, types + [TEXT] * text


@given(prompts(), st.integers(0, 3))
def test_experts_and_positions_follow_the_rules(prompt, padding):
    ids, types = prompt
    model = model_of("sdpa")
    row = torch.tensor([[zoo.PAD] * padding + ids])
    found = PictureTokens.of(row, model.config).vision_expert[0].tolist()
    experts = [expert_of(types, place) == "vision" for place in range(len(ids))]
    assert found == [False] * padding + experts
    mask = torch.tensor([[0] * padding + [1] * len(ids)])
    arguments = {"attention_mask": mask}
    places = model._prepare_position_ids_for_generation(row, arguments)[0].tolist()
    assert places[padding:] == positions_of(types)


def test_the_rule_of_the_published_model_written_out():
    model = model_of("sdpa")
    ids = torch.tensor([[zoo.BOS, BOI, IMAGE, IMAGE, IMAGE, EOI, 5, 6]])
    found = PictureTokens.of(ids, model.config)
    assert found.vision_expert[0].int().tolist() == [0, 1, 1, 1, 1, 0, 0, 0]
    places = model._prepare_position_ids_for_generation(ids, {})
    assert places[0].tolist() == [0, 1, 2, 2, 2, 3, 4, 5]


@pytest.mark.parametrize("batch", ["single", "padded3", "padded3_text"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_decoding_equals_forwards_without_a_cache(attention, batch):
    model = model_of(attention)
    inputs = zoo.inputs("cogvlm", model, batch)
    logits, tokens = oracle.generate_logits(model, inputs, steps=4)
    expected = oracle.plain_logits(model, inputs, tokens[:, :4])
    torch.testing.assert_close(logits, expected, atol=TOLERANCE, rtol=0)
    # Positions of new tokens are known from the cache alone, too.
    by_steps = oracle.manual_logits(model, inputs, tokens[:, :4])
    torch.testing.assert_close(by_steps, expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("batch", ["padded3", "padded3_text"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_prompt_in_a_batch_is_as_alone(attention, batch, side):
    model = model_of(attention)
    inputs = zoo.inputs("cogvlm", model, batch, padding_side=side)
    with torch.no_grad():
        together = model(**inputs).logits
        for row, mask in enumerate(inputs["attention_mask"]):
            single = model(**zoo.inputs("cogvlm", model, batch, only=row)).logits[0]
            actual = together[row, mask.bool()]
            torch.testing.assert_close(actual, single, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 2},
        {"do_sample": True, "num_return_sequences": 2},
        {"prompt_lookup_num_tokens": 2},
        {"cache_implementation": "static", "disable_compile": True},
    ],
    ids=str,
)
def test_other_ways_of_generating_equal_those_without_a_cache(options):
    if not zoo.SINCE_5_19 and ("num_beams" in options or "do_sample" in options):
        pytest.skip("repeats pixels, not features")
    model = model_of("sdpa")
    batch = "single" if "prompt_lookup_num_tokens" in options else "padded3_text"
    inputs = zoo.inputs("cogvlm", model, batch)

    def said(**others):
        torch.manual_seed(0)
        return model.generate(**inputs, max_new_tokens=6, **others)

    plain = {k: v for k, v in options.items() if k.startswith(("num_b", "do_s", "num_r"))}
    assert torch.equal(said(**options), said(**plain, use_cache=False))


def test_compiled_steps_on_a_pruned_static_cache_equal_the_oracle():
    model = model_of("sdpa")
    inputs = zoo.inputs("cogvlm", model, "single")
    handle = Scattered(DEEP).attach(model)
    text = inputs["input_ids"].shape[1] - 16
    cache = handle.static_cache(num_visual=16, num_text=text, max_new_tokens=4)
    step = torch.compile(model.forward, backend="eager", fullgraph=True, dynamic=False)
    tokens = torch.tensor([[7, 8, 9]])
    for _ in range(2):
        with torch.inference_mode():
            cache.reset()
            rows = [model(**inputs, past_key_values=cache).logits[:, -1]]
            for token in tokens[0]:
                new = token.view(1, 1).clone()
                rows.append(step(input_ids=new, past_key_values=cache).logits[:, -1])
    handle.detach()
    columns = oracle.columns_from_trace(
        handle.trace.samples[-1:], inputs["attention_mask"], zoo.LAYERS
    )
    expected = oracle.oracle_logits(model, inputs, columns, tokens)
    torch.testing.assert_close(torch.stack(rows, dim=1), expected, atol=TOLERANCE, rtol=0)


def test_compiled_prefills_are_refused_as_their_routing_depends_on_the_prompt():
    model = model_of("sdpa")
    handle = Scattered(DEEP).attach(model)
    handle.compile_prefill("eager")
    with pytest.raises(UnsupportedError, match="one graph of CogVLMDecoderLayer"), torch.no_grad():
        model(**zoo.inputs("cogvlm", model, "single"))
    handle.detach()


def test_a_second_turn_goes_on_where_the_cache_ends():
    model = model_of("sdpa")
    inputs = zoo.inputs("cogvlm", model, "single")
    out = model.generate(**inputs, max_new_tokens=3, return_dict_in_generate=True)
    cache = out.get("cache", out.get("past_key_values"))
    whole = torch.cat([out.sequences, torch.tensor([[7, 8, 9]])], dim=1)
    name = "cache" if "cache" in out else "past_key_values"
    later = model.generate(input_ids=whole, max_new_tokens=3, **{name: cache})
    pixels = {"pixel_values": inputs["pixel_values"]}
    assert torch.equal(later, model.generate(input_ids=whole, max_new_tokens=3, **pixels))


def test_the_weight_is_applied_before_the_cast():
    norm = CogVLMRMSNorm(2, eps=0.0).to(torch.bfloat16)
    norm.weight.data = torch.tensor([5.125, 1.0], dtype=torch.bfloat16)
    # 1 / sqrt((1 + 4) / 2) = 0.632456, and 5.125 times that is 3.241335, or 207.4 steps of 2^-6: 207 of them.
    # Cast first, it would be 0.6328125, and the product 207.6 steps, so 208 of them: 3.25.
    # 2 / sqrt(2.5) = 1.264911 is 161.9 steps of 2^-7.
    normal = norm(torch.tensor([1.0, 2.0], dtype=torch.bfloat16))
    assert normal.dtype == torch.bfloat16
    assert normal.tolist() == [207 / 2**6, 162 / 2**7]


def test_faults_in_the_routing_show(monkeypatch):
    """What the other tests would see if eoi went to the vision experts, or patches had their own places."""
    model = model_of("sdpa")
    pixels = torch.randn(3, 56, 56, generator=torch.Generator().manual_seed(1))
    arguments = alone(PROMPTS["as published"], pixels)
    expected = by_hand(model).logits(PROMPTS["as published"], pixels)

    def error() -> float:
        with torch.no_grad():
            return float((model(**arguments).logits[0] - expected).abs().max())

    assert error() < TOLERANCE
    everything = property(lambda self: self.visual)
    nothing = property(lambda self: self.patch & ~self.patch)
    for fault in ({"vision_expert": everything}, {"vision_expert": nothing}, {"shares": nothing}):
        with monkeypatch.context() as patched:
            for name, changed in fault.items():
                patched.setattr(PictureTokens, name, changed)
            assert error() > 0.1, fault


def test_a_routing_that_is_not_cut_shows(monkeypatch):
    model = model_of("sdpa")
    inputs = zoo.inputs("cogvlm", model, "padded3_text")
    assert oracle.compare(model, inputs, Scattered(DEEP)).worst < TOLERANCE
    right = LayerArguments._rotary

    def uncut(self, embeddings, hidden):
        cos, sin, _ = right(self, embeddings, hidden)
        return (
            cos,
            sin,
            embeddings[2].reshape(-1, cos.shape[-1])[: cos[..., 0].numel()].view_as(cos),
        )

    monkeypatch.setattr(LayerArguments, "_rotary", uncut)
    assert oracle.compare(model, inputs, Scattered(DEEP)).worst > 0.1


@pytest.mark.parametrize("method", ["fastv", "tome", "visionzip", "pooling"])
def test_patches_that_stay_or_merge_go_to_the_vision_experts_with_boi(method, monkeypatch):
    model, right, routed = model_of("sdpa"), Route.of.__func__, []

    def spy(cls, embeddings, length):
        route = right(cls, embeddings, length)
        routed.append(0 if route is None else len(route.vision))
        return route

    monkeypatch.setattr(Route, "of", classmethod(spy))
    inputs = zoo.inputs("cogvlm", model, "single")
    with create(method, Budget.ratio(0.5))(model) as trace, torch.no_grad():
        model(**inputs)
    levels = trace.samples[0].tokens_per_layer
    assert levels[-1] < 16
    assert routed == [kept + 1 for kept in levels]


def test_boi_and_eoi_are_never_cut_and_the_patches_can_all_be():
    model = model_of("sdpa")
    inputs = zoo.inputs("cogvlm", model, "single")
    with AutoPrune(Budget.ratio(0.3))(model) as trace, torch.no_grad():
        model(**inputs)
    sample = trace.samples[0]
    assert sample.num_visual == 16
    assert (inputs["input_ids"][0, sample.visual_positions] == IMAGE).all()


def test_compacted_positions_are_refused_with_the_reason():
    model = model_of("sdpa")
    with (
        pytest.raises(UnsupportedError, match="all patches of a picture have one position"),
        Scattered(DEEP, positions="compacted")(model),
    ):
        pass


def test_what_cannot_be_right_is_refused_in_a_sentence():
    model = model_of("sdpa")
    pixels = torch.randn(1, 3, 56, 56)
    ids = torch.tensor([[zoo.BOS, *SHOWN, 5]])
    with pytest.raises(ValueError, match="places for 16 patches, but 0 came"):
        model(input_ids=ids)
    with pytest.raises(ValueError, match="places for 16 patches, but 32 came"):
        model(input_ids=ids, pixel_values=pixels.repeat(2, 1, 1, 1))
    with pytest.raises(ValueError, match="1 of the prompts end inside of a picture"):
        model(input_ids=ids[:, :-2], pixel_values=pixels)
    with pytest.raises(ValueError, match=r"\[1, 3, 28, 56\], but this tower takes .* 56, 56\]"):
        model(input_ids=ids, pixel_values=pixels[:, :, :28])
    embeds = model.get_input_embeddings()(torch.tensor([[5, 6]]))
    with pytest.raises(ValueError, match="pictures need input_ids"):
        model(inputs_embeds=embeds, pixel_values=pixels)
    with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
        model(input_ids=ids, inputs_embeds=embeds)
    with pytest.raises(ValueError, match="2 key-value heads for 4 heads"):
        CogVLMConfig(text_config={"num_attention_heads": 4, "num_key_value_heads": 2})
