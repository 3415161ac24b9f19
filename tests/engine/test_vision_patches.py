"""Patches in packed, masked and chunked attention; patches of padding; images among videos."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask

from autoprune.engine.vision import patches as vision_patches
from autoprune.engine.vision.patches import received_attention
from autoprune.engine.vision.view import VisionView, in_prompt_order
from autoprune.parts import scorers
from tests import zoo
from tests.kernels import flash_attention
from tests.watch import observe, renumbered, tower_values, vision_scores

BOTH_MEDIA = ["llava_onevision", "llava_next_video", "qwen2_vl", "qwen2_5_vl", "qwen3_vl"]
model_of = functools.cache(functools.partial(zoo.build, attn_implementation="eager"))


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.allclose(one, other, atol=1e-6, rtol=1e-4, equal_nan=True)


def random_heads(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("at_once", [1, 500, 1 << 24])
def test_pictures_in_one_row_are_scored_one_by_one(at_once, monkeypatch):
    monkeypatch.setattr(vision_patches, "WEIGHTS_AT_ONCE", at_once)
    query, key = random_heads(1, 2, 21, 8), random_heads(1, 2, 21, 8)
    sizes = [6, 4, 11]
    alone = [
        received_attention(q, k, None)
        for q, k in zip(query.split(sizes, 2), key.split(sizes, 2), strict=True)
    ]
    allowed = torch.block_diag(*[torch.ones(n, n) for n in sizes]).bool()[None, None]
    additive = torch.where(allowed, 0.0, torch.finfo(torch.float32).min)
    for mask in (allowed, additive):
        assert same(received_attention(query, key, None, mask), torch.cat(alone, dim=1))
    for scores in alone:
        assert torch.allclose(scores.sum(), torch.tensor(1.0))


def test_padding_neither_gives_nor_gets_attention():
    query, key = random_heads(2, 2, 9, 8), random_heads(2, 2, 9, 8)
    real = torch.arange(9) < torch.tensor([[5], [9]])
    expected = torch.zeros(2, 9)
    expected[:1, :5] = received_attention(query[:1, :, :5], key[:1, :, :5], 0.3)
    expected[1:] = received_attention(query[1:], key[1:], 0.3)
    block_mask = create_block_mask(lambda b, h, q, k: real[b, k], 2, None, 9, 9, device="cpu")
    for mask in (real, real[:, None, None, :].expand(-1, -1, 9, -1), block_mask):
        assert same(received_attention(query, key, 0.3, mask), expected)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ["idefics3", "smolvlm"])
def test_masked_pixels_get_no_score(name, attention):
    model = zoo.build(name, attention)
    arguments = zoo.inputs(name, model)
    arguments["pixel_attention_mask"] = torch.ones(1, 1, 56, 56, dtype=torch.bool)
    arguments["pixel_attention_mask"][..., 28:] = False
    (scores,) = vision_scores(model, arguments)
    left, right = scores.view(4, 4).split(2, dim=1)
    assert (left > 0).all()
    assert (right == 0).all()
    # Tokens are means of 4 patches, whose attention adds up to 1.
    assert torch.allclose(4 * left.sum(), torch.tensor(1.0))


@pytest.mark.parametrize(
    "name", ["llava", "idefics3", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "glm4v", "mistral3"]
)
def test_flash_attention_conventions_give_the_same(name):
    if name == "mistral3" and not zoo.SINCE_5_19:
        pytest.skip("does not tell flash attention where a picture ends")
    model = model_of(name)
    arguments = zoo.inputs(name, model, "padded3")
    expected = tower_values(model, arguments)
    with flash_attention(model):
        values = tower_values(model, arguments)
    for one, other in zip(values, expected, strict=True):
        assert same(one, other)


def with_bands(pixels: torch.Tensor, first: int, last: int, axis: int) -> torch.Tensor:
    """The pictures with `first` and `last` rows (axis -2) or columns of one colour at the edges."""
    pixels, size = pixels.clone(), pixels.shape[axis]
    for start, length in ((0, first), (size - last, last)):
        pixels.narrow(axis, start, length).fill_(0.25)
    return pixels


# Height of a token in pixels is 14 everywhere; gemma3 and internvl make it from 2 x 2 patches.
@pytest.mark.parametrize("axis", [-2, -1])
@pytest.mark.parametrize("name", ["llava", "paligemma", "gemma3", "internvl"])
def test_padding_to_a_square_never_wins(name, axis):
    model = model_of(name)
    arguments = zoo.inputs(name, model)
    arguments["pixel_values"] = with_bands(arguments["pixel_values"], 21, 14, axis)
    seen = observe(model, arguments)
    grid = seen.vision_padding.view(4, 4).transpose(0, -2 - axis)
    assert grid.tolist() == [[True] * 4, [False] * 4, [False] * 4, [True] * 4]
    wins = scorers.vision_attention(seen).argsort(descending=True)[0]
    assert not seen.vision_padding[0, wins[:8]].any()


@pytest.mark.parametrize("name", ["llava", "gemma3", "internvl"])
def test_a_picture_without_padding_has_none(name):
    model = model_of(name)
    arguments = zoo.inputs(name, model, "padded3")
    arguments["pixel_values"][1] = 0.5  # a picture of one colour
    assert not observe(model, arguments).vision_padding.any()


def test_pixels_at_the_edge_that_fill_no_patch_are_left_out():
    pixels = with_bands(torch.randn(1, 3, 60, 60), 14, 0, -2)
    padding = vision_patches.padded_patches(pixels, torch.Size([1, 16]), 14)
    assert padding.view(4, 4).tolist() == [[True] * 4] + [[False] * 4] * 3


def test_padding_is_looked_for_in_square_pictures_only():
    for pixels, shape in [
        (None, (1, 16)),
        (torch.zeros(1, 5, 3, 56, 56), (5, 16)),
        (torch.zeros(2, 3, 56, 56), (1, 32)),
        (torch.zeros(1, 3, 28, 112), (1, 16)),
        (torch.zeros(1, 3, 56, 56), (1, 17)),
    ]:
        assert vision_patches.padded_patches(pixels, torch.Size(shape), 14) is None


def mixed(name: str, model, prompts: list[list[tuple[str, int]]]) -> dict[str, torch.Tensor]:
    """A batch whose prompts hold images and videos in the given order, left-padded."""
    family, generator = zoo.FAMILIES[name], torch.Generator().manual_seed(5)
    rows, pixels = [], {"image": [], "video": []}
    for prompt in prompts:
        ids = [zoo.BOS]
        for medium, which in prompt:
            # The same picture whatever else is in the batch.
            own = torch.Generator().manual_seed(which)
            visual = getattr(family, medium)(which, own)
            ids += [*visual.ids, 7, 8]
            pixels[medium].append(visual.payload)
        rows.append(torch.tensor(ids + torch.randint(4, 100, (5,), generator=generator).tolist()))
    length = max(map(len, rows))
    ids = torch.stack([torch.nn.functional.pad(row, (length - len(row), 0)) for row in rows])
    arguments = {"input_ids": ids, "attention_mask": (ids != zoo.PAD).long()}
    if family.token_types:
        arguments[family.token_types] = zoo._token_types(ids, family, "image")
    for payloads in pixels.values():
        arguments |= zoo._concatenate([payloads]) if payloads else {}
    return arguments


@pytest.mark.parametrize("beams", [1, 2])
@pytest.mark.parametrize("name", BOTH_MEDIA)
def test_images_and_videos_of_a_prompt_are_put_in_its_order(name, beams):
    if beams > 1 and not zoo.SINCE_5_19:
        pytest.skip("repeats pixels, not features, and gets several pictures into the wrong order")
    model = model_of(name)
    prompts = [
        [("video", 0), ("image", 1)],
        [("image", 0), ("video", 1), ("image", 2)],
        [("video", 2)],
        [("image", 2)],
    ]
    one = {
        item: tower_values(model, mixed(name, model, [[item]]))[0] for p in prompts for item in p
    }
    seen = tower_values(model, mixed(name, model, prompts), num_beams=beams)
    assert len(seen) == beams * len(prompts)
    for row, values in enumerate(seen):
        alone = [one[item].clone() for item in prompts[row // beams]]
        for number, item in enumerate(alone):
            item[:, 0] += 100 * number  # no two items share a picture
        assert same(values, renumbered(torch.cat(alone)))


def test_only_what_both_media_have_is_merged():
    scores, places = torch.arange(6.0), torch.zeros(6, 3)
    image = VisionView({"vision_scores": scores, "places": places})
    video = VisionView({"vision_scores": 10 + scores})
    is_video = np.arange(12) % 2 == 0
    merged = in_prompt_order(image, video, [is_video]).values
    assert list(merged) == ["vision_scores"]
    assert merged["vision_scores"].view(6, 2).tolist() == [[10 + i, i] for i in range(6)]
    assert in_prompt_order(image, video, [~is_video | is_video]) is video
    assert in_prompt_order(image, video, [~is_video & is_video]) is image


def test_scores_of_other_prompts_are_not_used():
    view = VisionView({"vision_scores": torch.arange(12.0)})
    assert [s.tolist() for s in view.per_prompt([6, 6])["vision_scores"]] == [
        [*range(6)],
        [*range(6, 12)],
    ]
    assert [len(s) for s in view.per_prompt([8, 8, 4, 4])["vision_scores"]] == [8, 8, 4, 4]
    for counts in ([8, 4, 8, 4], [5], [24], [0, 0], []):
        assert view.per_prompt(counts) == {}
