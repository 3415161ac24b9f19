"""Keys of visual tokens, the attention they receive in a middle block, and what is not asked for."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import transformers

from autoprune.contract import Tower
from autoprune.engine.vision.call import Call
from autoprune.engine.vision.maps import PATCH_LAYOUTS
from tests import zoo
from tests.engine.test_vision_scores import (
    SETTINGS,
    blocks_of,
    has_cls,
    model_of,
    received,
    record_attention,
    same,
    selected_block,
)
from tests.watch import EVERYTHING, Watch, observe

NAMES = {
    "vision_scores": Tower(attention=True),
    "vision_keys": Tower(keys=True),
    "vision_received": Tower(received=True),
    "vision_middle": Tower(middle=0.5),
    "places": Tower(places=True),
}


def spied(monkeypatch, model, arguments, media: str, wanted: Tower):
    """What is seen; the family's map, and what it was given last."""
    key = model.config.model_type
    to_tokens, given = getattr(PATCH_LAYOUTS[key], media), []

    def spy(base, patches, call):
        given.append((base, patches, call))
        return to_tokens(base, patches, call)

    with monkeypatch.context() as patched:
        patched.setitem(PATCH_LAYOUTS, key, dataclasses.replace(PATCH_LAYOUTS[key], **{media: spy}))
        return observe(model, arguments, wanted), to_tokens, given[-1]


@pytest.mark.parametrize(("name", "media"), SETTINGS)
def test_channels_do_not_mix_on_their_way_to_the_tokens(name, media, monkeypatch):
    model = model_of(name)
    arguments = zoo.inputs(name, model, "padded3", media)
    _, to_tokens, (base, patches, call) = spied(
        monkeypatch, model, arguments, media, NAMES["vision_scores"]
    )
    channels = torch.randn(*patches.shape[:-1], 5, generator=torch.Generator().manual_seed(0))
    together = to_tokens(base, channels, call)
    alone = [to_tokens(base, channel, call) for channel in channels.split(1, dim=-1)]
    assert same(together, torch.cat(alone, dim=-1))


def places_in_windows(grids: torch.Tensor) -> list[int]:
    """Which token stands where when they are sorted by windows of 2 x 2 tokens."""
    places, start = [], 0
    for _, height, width in (grids // 2).tolist():
        for top in range(0, height, 2):
            for left in range(0, width, 2):
                for row in range(top, min(top + 2, height)):
                    for column in range(left, min(left + 2, width)):
                        places.append(start + row * width + column)
        start += height * width
    return places


def mean_of_patches(name: str, keys: list[torch.Tensor], arguments) -> torch.Tensor:
    """[pictures, patches, channels] of every call -> [tokens, channels], spelled out."""
    if name == "qwen2_5_vl":
        merged = torch.cat(keys, dim=1).unflatten(1, (-1, 4)).mean(dim=2)[0]
        return merged[torch.tensor(places_in_windows(arguments["image_grid_thw"])).argsort()]
    if name == "mistral3":
        grids = [(h // 7, w // 7) for h, w in arguments["image_sizes"].tolist()]
        pictures = keys[0][0].split([rows * columns for rows, columns in grids])
    else:
        pictures = torch.cat(keys)
        grids = [(round(pictures.shape[1] ** 0.5),) * 2] * len(pictures)
    side = 1 if name == "llava" else 2
    return torch.cat(
        [
            picture.view(rows // side, side, columns // side, side, -1)
            .mean(dim=(1, 3))
            .flatten(0, 1)
            for picture, (rows, columns) in zip(pictures, grids, strict=True)
        ]
    )


@pytest.mark.parametrize(
    "name", ["llava", "qwen2_5_vl", "internvl", "idefics3", "gemma3", "mistral3", "aya_vision"]
)
def test_a_tokens_key_is_the_mean_of_its_patches_keys(name, monkeypatch):
    model = model_of(name)
    arguments = zoo.inputs(name, model, "padded3")
    recorded = record_attention(monkeypatch, model, selected_block(model))
    seen = observe(model, arguments, Tower(keys=True))
    first = 1 if has_cls(model) else 0
    keys = [key.mean(dim=1)[:, first:] for key, _ in recorded]
    assert seen.vision_keys.dtype == torch.float32
    assert same(seen.vision_keys[seen.mask], mean_of_patches(name, keys, arguments))


def test_keys_are_what_the_key_projection_gives():
    model, projected = model_of("llava"), []
    arguments = zoo.inputs("llava", model)
    projection = blocks_of(model)[selected_block(model)].self_attn.k_proj
    handle = projection.register_forward_hook(lambda module, args, out: projected.append(out))
    seen = observe(model, arguments, Tower(keys=True))
    handle.remove()
    assert same(seen.vision_keys, projected[0].unflatten(-1, (2, -1)).mean(dim=2)[:, 1:])


@pytest.mark.parametrize(("name", "media"), SETTINGS)
def test_the_middle_is_what_patches_receive_in_that_block(name, media, monkeypatch):
    model = model_of(name)
    arguments = zoo.inputs(name, model, "padded3", media)
    recorded = record_attention(monkeypatch, model, 0)
    seen, to_tokens, (base, patches, call) = spied(
        monkeypatch, model, arguments, media, Tower(middle=0.25)
    )
    first = 1 if has_cls(model) else 0
    if name == "mistral3":
        # All pictures are packed into one row.
        sizes = (arguments["image_sizes"] // 7).prod(dim=1).tolist()
        blocks = recorded[0][1].split(sizes, dim=2)
        starts = [sum(sizes[:picture]) for picture in range(len(sizes))]
        weights = [b.narrow(3, s, n) for b, s, n in zip(blocks, starts, sizes, strict=True)]
    else:
        weights = [weights[..., first:] for _, weights in recorded]
    expected = torch.cat([received(w) for w in weights]).view_as(patches)
    assert same(seen.vision_middle[seen.mask], to_tokens(base, expected, call)[:, 0])


def test_windows_share_their_attention_among_themselves():
    model = model_of("qwen2_5_vl")
    seen = observe(model, zoo.inputs("qwen2_5_vl", model), EVERYTHING)
    # Tokens are means of 4 patches, whose attention adds up to 1.
    middle, scores = (
        4 * values.view(2, 2, 2, 2).sum(dim=(1, 3))
        for values in (seen.vision_middle, seen.vision_scores)
    )
    assert same(middle, torch.ones(2, 2))
    assert not same(scores, torch.ones(2, 2))


@pytest.mark.parametrize("name", ["llava", "gemma3"])
def test_the_middle_may_be_the_scored_block(name):
    model = model_of(name)
    arguments = zoo.inputs(name, model, "padded3")
    seen = observe(model, arguments, Tower(attention=True, middle=1.0))
    alone = observe(model, arguments, Tower(attention=True))
    assert same(seen.vision_scores, alone.vision_scores)
    assert same(seen.vision_middle, alone.vision_scores) == (not has_cls(model))


@pytest.mark.parametrize(("name", "media"), SETTINGS)
def test_what_patches_receive_in_the_scored_block_is_seen_beside_its_scores(name, media):
    model = model_of(name)
    arguments = zoo.inputs(name, model, "padded3", media)
    seen = observe(model, arguments, Tower(attention=True, received=True))
    middle = observe(model, arguments, Tower(middle=1.0)).vision_middle
    assert same(seen.vision_received, middle)
    assert same(seen.vision_scores, observe(model, arguments).vision_scores)
    assert same(seen.vision_received, seen.vision_scores) == (not has_cls(model))


@pytest.mark.parametrize(
    ("depth", "share", "block"),
    [(24, 9 / 24, 8), (24, 1.0, 22), (24, 0.01, 0), (45, 29 / 45, 28), (27, 1 / 3, 8)],
)
def test_a_share_of_the_depth_is_rounded_up_to_a_block(depth, share, block):
    config = zoo.FAMILIES["llava"].config()
    config.vision_config.num_hidden_layers = depth
    model = transformers.LlavaForConditionalGeneration(config).eval()
    tapped = Watch(wanted=Tower(middle=share))(model).vision.parts.middle
    assert tapped is blocks_of(model)[block].self_attn


@pytest.mark.parametrize("asked", NAMES)
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_only_what_is_asked_for_is_seen(name, asked):
    model = model_of(name)
    seen = observe(model, zoo.inputs(name, model), NAMES[asked])
    assert [value for value in NAMES if getattr(seen, value) is not None] == [asked]
    scored = asked in ("vision_scores", "vision_received")
    assert (seen.vision_padding is not None) == (name == "llava" and scored)


def test_nothing_is_touched_for_a_method_that_asks_for_nothing(monkeypatch):
    monkeypatch.setattr(Call, "observe", lambda *args, **kwargs: pytest.fail("tapped"))
    model, method = model_of("llava"), Watch(wanted=Tower())
    before = dict(model.base_model.__dict__)
    with method(model), torch.no_grad():
        now = dict(model.base_model.__dict__)
        del now["__reduce_ex__"]  # of no matter to forwards: what copies of the model are made by
        assert now == before
        model(**zoo.inputs("llava", model))
    assert all(getattr(method.seen[0], value) is None for value in NAMES)


@pytest.mark.parametrize("generation", [{}, {"num_beams": 2}])
def test_given_scores_stand_beside_what_the_tower_tells(generation):
    model = model_of("llava")
    arguments, scores = zoo.inputs("llava", model), torch.arange(16.0)
    plain = observe(model, arguments, EVERYTHING)
    method = Watch(wanted=EVERYTHING)
    with method(model, vision_scores=scores), torch.no_grad():
        model.generate(**arguments, max_new_tokens=1, **generation)
    for row in range(generation.get("num_beams", 1)):
        assert torch.equal(method.seen[0].vision_scores[row], scores)
        assert same(method.seen[0].vision_keys[row], plain.vision_keys[0])
    assert method.seen[0].vision_padding is None


def test_an_unknown_family_tells_nothing():
    model = zoo.build("llava")
    model.config.model_type = "llava_of_tomorrow"
    with pytest.warns(UserWarning, match="llava_of_tomorrow"):
        seen = observe(model, zoo.inputs("llava", model), EVERYTHING)
    assert all(getattr(seen, value) is None for value in NAMES)
