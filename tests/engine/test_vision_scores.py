"""Scores from the vision tower: the right numbers on the right tokens; all it tells, for each prompt."""

from __future__ import annotations

import dataclasses
import functools
import sys

import pytest
import torch
import transformers
from torch import nn

from autoprune import AutoPrune
from autoprune.engine.vision import call as vision
from autoprune.engine.vision.maps import PATCH_LAYOUTS, tower_depth
from tests import zoo
from tests.watch import observe, tower_values, vision_scores

SCORED = {
    name: family
    for name, family in zoo.FAMILIES.items()
    if family.config().model_type in PATCH_LAYOUTS
}
SETTINGS = [
    pytest.param(name, media, id=f"{name}-{media}")
    for name, family in SCORED.items()
    for media in family.media
]
# These decode from the output of the last block but one.
SECOND_TO_LAST = {"llava", "llava_next", "llava_next_video", "video_llava"}
WITH_CLS = SECOND_TO_LAST | {"internvl", "cogvlm", "llama4"}
EVERY_PATCH = slice(None)
PATCHES_TRIED = 10

repeats_features = pytest.mark.skipif(not zoo.SINCE_5_19, reason="repeats pixels, not features")
model_of = functools.cache(functools.partial(zoo.build, attn_implementation="eager"))


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.allclose(one, other, atol=1e-6, rtol=1e-4, equal_nan=True)


def blocks_of(model: nn.Module) -> nn.ModuleList:
    tower = model.get_encoder(modality="image")
    depth = tower_depth(model.config)
    return next(m for m in tower.modules() if isinstance(m, nn.ModuleList) and len(m) == depth)


def selected_block(model: nn.Module) -> int:
    return len(blocks_of(model)) - (2 if model.config.model_type in SECOND_TO_LAST else 1)


def has_cls(model: nn.Module) -> bool:
    return model.config.model_type in WITH_CLS


def scores_if_only(monkeypatch, model, arguments, patch: int | slice):
    """Scores of all tokens if the tower attended to one patch (or a slice); number of patches."""
    counted = 0

    def of(images: int, patches: int) -> torch.Tensor:
        nonlocal counted
        flat = torch.zeros(10_000)
        flat[patch] = 1.0
        counted += images * patches
        return flat[counted - images * patches : counted].view(images, patches)

    with monkeypatch.context() as patched:
        patched.setattr(vision, "cls_attention", lambda q, *_: of(q.shape[0], q.shape[2] - 1))
        patched.setattr(vision, "received_attention", lambda q, *_: of(q.shape[0], q.shape[2]))
        return torch.cat(vision_scores(model, arguments)), counted


def what_the_decoder_sees(model, arguments, patch: int | slice | None) -> torch.Tensor:
    """Embeddings of all visual tokens if the tower's output for a patch (or slice) is disturbed."""
    seen = []

    def disturb(block, inputs, output):
        states = output[0] if isinstance(output, tuple) else output
        rows = states.flatten(0, -2).clone()
        real = torch.arange(len(rows))
        if has_cls(model):
            cls = states.shape[1] - 1 if model.config.model_type == "llama4" else 0
            real = real[real % states.shape[1] != cls]
        noise = torch.randn(rows.shape, generator=torch.Generator().manual_seed(1))
        rows[real[patch]] += noise[real[patch]]
        changed = rows.view_as(states)
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    def keep(text, args, kwargs):
        seen.append(kwargs["inputs_embeds"])

    handles = [model.get_decoder().register_forward_pre_hook(keep, with_kwargs=True)]
    if patch is not None:
        block = blocks_of(model)[selected_block(model)]
        handles.append(block.register_forward_hook(disturb, prepend=True))
    try:
        with torch.no_grad():
            model(**arguments)
    finally:
        for handle in handles:
            handle.remove()
    return seen[0][zoo.visual_mask(model, arguments["input_ids"])]


def check_patches(monkeypatch, model, arguments, tried: int) -> None:
    """A patch scores exactly the visual tokens that change when the tower's output for it is disturbed."""
    plain = what_the_decoder_sees(model, arguments, None)

    def tokens_of(patch: int | slice) -> torch.Tensor:
        disturbed = what_the_decoder_sees(model, arguments, patch)
        return (disturbed - plain).abs().amax(dim=-1) > 1e-5

    scores, count = scores_if_only(monkeypatch, model, arguments, EVERY_PATCH)
    with_patch = tokens_of(EVERY_PATCH)
    # A token's score is a mean: with 1 for every patch it is 1, and NaN if it has none.
    assert torch.equal(scores.isnan(), ~with_patch)
    assert same(scores[with_patch], torch.ones(int(with_patch.sum())))
    for patch in torch.linspace(0, count - 1, tried).long().tolist():
        scores, _ = scores_if_only(monkeypatch, model, arguments, patch)
        assert torch.equal(scores.nan_to_num() > 0, tokens_of(patch)), patch


@pytest.mark.parametrize(("name", "media"), SETTINGS)
def test_a_patch_scores_exactly_the_tokens_it_makes(name, media, monkeypatch):
    model = model_of(name)
    arguments = zoo.inputs(name, model, "padded3", media)
    check_patches(monkeypatch, model, arguments, PATCHES_TRIED)


def patches_seen(monkeypatch, model, arguments, media: str) -> torch.Tensor:
    """The scores that the map from patches to tokens was given first, flat."""
    key = model.config.model_type
    to_tokens, seen = getattr(PATCH_LAYOUTS[key], media), []

    def spy(base, patches, call):
        seen.append(patches)
        return to_tokens(base, patches, call)

    monkeypatch.setitem(PATCH_LAYOUTS, key, dataclasses.replace(PATCH_LAYOUTS[key], **{media: spy}))
    observe(model, arguments)
    return seen[0].flatten()


def record_attention(monkeypatch, model, block: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Gathers the keys and weights of each call of a block's attention from now on."""
    tower = blocks_of(model)[block]
    attention = next(m for m in tower.modules() if hasattr(m, "is_causal"))
    module = sys.modules[type(attention).__module__]
    eager, recorded = module.eager_attention_forward, []

    def record(module, query, key, *args, **kwargs):
        output = eager(module, query, key, *args, **kwargs)
        if module is attention:
            recorded.append((key, output[1]))
        return output

    monkeypatch.setattr(module, "eager_attention_forward", record)
    return recorded


def received(weights: torch.Tensor) -> torch.Tensor:
    """[images, heads, rows, patches] -> flat."""
    return weights.mean(dim=(1, 2)).flatten()


@pytest.mark.parametrize(("name", "media"), SETTINGS)
def test_scores_are_the_attention_weights_of_the_selected_block(name, media, monkeypatch):
    model = model_of(name)
    arguments = zoo.inputs(name, model, "padded3", media)
    recorded = record_attention(monkeypatch, model, selected_block(model))
    scores = patches_seen(monkeypatch, model, arguments, media)
    weights = [weights for _, weights in recorded]
    if has_cls(model):
        expected = [w[:, :, 0, 1:].mean(dim=1).flatten() for w in weights]
    elif name == "mistral3":
        # All pictures are packed into one row.
        ends = (arguments["image_sizes"] // 7).prod(dim=1).cumsum(dim=0).tolist()
        starts = [0, *ends[:-1]]
        expected = [received(weights[0][:, :, a:b, a:b]) for a, b in zip(starts, ends, strict=True)]
    else:
        expected = [received(w) for w in weights]
    assert same(scores, torch.cat(expected))


@pytest.mark.parametrize("name", ["llava", "llava_onevision", "internvl", "gemma3", "idefics3"])
def test_scores_are_what_the_tower_itself_reports(name, monkeypatch):
    model = model_of(name)
    arguments = zoo.inputs(name, model, "single")
    scores = patches_seen(monkeypatch, model, arguments, "image")
    pixels = arguments["pixel_values"].flatten(0, -4)
    with torch.no_grad():
        tower = model.get_encoder(modality="image")(pixels, output_attentions=True)
    weights = tower.attentions[selected_block(model)]
    from_cls = weights[:, :, 0, 1:].mean(dim=1).flatten()
    assert same(scores, from_cls if has_cls(model) else received(weights))


@pytest.mark.parametrize("name", SCORED)
def test_attention_backends_agree(name):
    if "sdpa" not in zoo.FAMILIES[name].attentions:
        pytest.skip("eager only")
    model = model_of(name)
    arguments = zoo.inputs(name, model, "padded3")
    other = zoo.build(name, "sdpa")
    for one, two in zip(
        tower_values(model, arguments), tower_values(other, arguments), strict=True
    ):
        assert same(one, two)


@functools.cache
def alone(name: str, batch: str, media: str) -> list[torch.Tensor]:
    """What each prompt of a batch has when it is run by itself; nothing for a prompt of text only."""
    model, values = model_of(name), []
    for prompt in range(3):
        arguments = zoo.inputs(name, model, batch, media, only=prompt)
        has_visual = zoo.visual_mask(model, arguments["input_ids"]).any()
        values.append(tower_values(model, arguments)[0] if has_visual else torch.empty(0, 1))
    return values


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("batch", ["padded3", "padded3_text"])
@pytest.mark.parametrize(("name", "media"), SETTINGS)
def test_a_prompt_has_in_a_batch_what_it_has_alone(name, media, batch, side):
    model = model_of(name)
    arguments = zoo.inputs(name, model, batch, media, padding_side=side)
    for one, other in zip(tower_values(model, arguments), alone(name, batch, media), strict=True):
        assert same(one, other)


@pytest.mark.parametrize("batch", ["padded3_text", pytest.param("padded3", marks=repeats_features)])
@pytest.mark.parametrize(("name", "media"), SETTINGS)
def test_every_beam_has_what_its_prompt_has(name, media, batch):
    if (name, media) == ("glm4v", "video"):
        pytest.skip("transformers cannot repeat GLM-4V's videos: it looks for video tokens")
    model = model_of(name)
    arguments = zoo.inputs(name, model, batch, media)
    seen = tower_values(model, arguments, num_beams=2)
    assert len(seen) == 6
    for row, values in enumerate(alone(name, batch, media)):
        assert same(seen[2 * row], values)
        assert same(seen[2 * row + 1], values)


@pytest.mark.parametrize(
    "generation", [{"do_sample": False}, {"do_sample": True, "num_return_sequences": 3}]
)
@pytest.mark.parametrize("name", ["llava", "llava_next", "qwen2_5_vl", "idefics3"])
def test_generation_has_what_a_forward_has(name, generation):
    model = model_of(name)
    arguments = zoo.inputs(name, model, "padded3_text")
    copies = generation.get("num_return_sequences", 1)
    forward = [v for v in tower_values(model, arguments) for _ in range(copies)]
    for one, other in zip(tower_values(model, arguments, **generation), forward, strict=True):
        assert same(one, other)


@pytest.mark.parametrize(("name", "media"), SETTINGS)
def test_nothing_stays_on_the_model(name, media):
    model = model_of(name)
    before = dict(model.base_model.__dict__)
    handle = AutoPrune(budget=4).attach(model)
    assert f"get_{media}_features" in model.base_model.__dict__
    handle.detach()
    assert model.base_model.__dict__ == before


def test_a_method_of_the_instance_is_put_back():
    model = zoo.build("llava")
    own = model.base_model.get_image_features
    model.base_model.get_image_features = own
    observe(model, zoo.inputs("llava", model))
    assert model.base_model.__dict__["get_image_features"] is own


def test_an_unknown_family_is_pruned_by_text_attention_alone():
    model = zoo.build("llava")
    model.config.model_type = "llava_of_tomorrow"
    arguments = zoo.inputs("llava", model)
    with pytest.warns(UserWarning, match="llava_of_tomorrow"):
        assert observe(model, arguments).vision_scores is None
    with (
        pytest.warns(UserWarning, match="llava_of_tomorrow"),
        AutoPrune(budget=4)(model) as trace,
    ):
        model.generate(**arguments, max_new_tokens=2)
    assert sum(trace.samples[0].tokens_per_layer) == 4 * zoo.LAYERS


def test_of_several_selected_layers_the_deepest_counts():
    config = zoo.FAMILIES["llava"].config()
    for layers, block in [([-2, 1], 1), ([1, -1], 2), (0, None)]:
        config.vision_feature_layer = layers
        model = transformers.LlavaForConditionalGeneration(config).eval()
        tapped = AutoPrune(budget=4)(model).vision.parts.attention
        assert tapped is (None if block is None else blocks_of(model)[block].self_attn)
