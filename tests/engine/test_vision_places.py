"""Where visual tokens lie in their pictures: the picture's number, row and column."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers

from autoprune.contract import Tower
from autoprune.engine.vision.maps import PATCH_LAYOUTS, token_places
from tests import zoo
from tests.engine.test_vision_scores import (
    SETTINGS,
    blocks_of,
    model_of,
    same,
    what_the_decoder_sees,
)
from tests.watch import EVERYTHING, observe, renumbered

TOKENS_TRIED = 8
NEWLINE = (float("nan"),) * 3


def lines(pictures: list[tuple[int, int, str]]) -> torch.Tensor:
    """Places of pictures of (rows, columns), each of whose rows, or whose end, has a newline."""
    places = []
    for number, (rows, columns, newline) in enumerate(pictures):
        for row in range(rows):
            places += [(number, row, column) for column in range(columns)]
            places += (
                [NEWLINE] if newline == "row" or (newline == "end" and row + 1 == rows) else []
            )
    return torch.tensor(places, dtype=torch.float32)


def plain(*shapes: tuple[int, int]) -> list[tuple[int, int, str]]:
    return [(*shape, "") for shape in shapes]


SQUARES = [plain((4, 4)), plain((4, 4)), plain((4, 4), (4, 4))]
OF_ANY_SIZE = [plain((4, 6)), plain((4, 4)), plain((2, 6), (4, 4))]
SMALL = (4, 4, "")
JOINED = [
    [SMALL, (4, 8, "row")],
    [SMALL, (4, 4, "row")],
    [SMALL, (2, 8, "row"), SMALL, (4, 4, "row")],
]
FRAMES = [plain(*[(2, 3)] * 2), plain(*[(2, 4)] * 2), plain(*[(2, 3)] * 3)]


@pytest.mark.parametrize(
    ("name", "media", "prompts"),
    [
        ("llava", "image", SQUARES),
        ("internvl", "image", SQUARES),
        ("idefics3", "image", SQUARES),
        ("qwen2_5_vl", "image", OF_ANY_SIZE),
        ("mistral3", "image", OF_ANY_SIZE),
        ("llava_next", "image", JOINED),
        ("llava_onevision", "image", JOINED),
        ("qwen2_5_vl", "video", FRAMES),
        ("glm4v", "video", FRAMES),
        ("llava_next_video", "video", [plain(*[(2, 2)] * 4)] * 3),
        ("llava_onevision", "video", [[*plain(*[(2, 2)] * 3), (2, 2, "end")]] * 3),
    ],
)
def test_places_are_rows_and_columns_of_tokens(name, media, prompts):
    model = model_of(name)
    seen = observe(model, zoo.inputs(name, model, "padded3", media), Tower(places=True))
    for places, real, pictures in zip(seen.places, seen.mask, prompts, strict=True):
        assert same(renumbered(places[real]), lines(pictures))


def pixels_at(name: str, media: str, arguments, place: torch.Tensor) -> torch.Tensor:
    """The pixels at a token's place, to be disturbed where they are."""
    picture, row, column = place.long().tolist()
    pixels = arguments["pixel_values" if media == "image" else "pixel_values_videos"]
    if f"{media}_grid_thw" in arguments:
        start = 0
        for frames, height, width in arguments[f"{media}_grid_thw"].tolist():
            if picture < frames:
                start += picture * height * width + 4 * (row * width // 2 + column)
                return pixels[start : start + 4]
            picture -= frames
            start += frames * height * width
    if "image_sizes" in arguments and name != "mistral3":
        picture, joined = divmod(picture, 2)
        # The small version, or one of two tiles side by side.
        pixels = pixels[picture, column // 4 + 1 if joined else 0]
        # Of the tile, a quarter at the top may be padding.
        row += int(joined and arguments["image_sizes"][picture, 0] < 56)
        column %= 4
    else:
        pixels = [frame for frame in pixels.flatten(0, -4) if frame.any()][picture]
    size = 14 if media == "image" else 28
    return pixels[:, size * row : size * (row + 1), size * column : size * (column + 1)]


@pytest.fixture
def unmixed(request):
    """A model whose tower does not let patches see each other."""
    model = model_of(request.param)
    handles = [
        module.register_forward_hook(
            lambda module, args, out: (0 * out[0], *out[1:]) if isinstance(out, tuple) else 0 * out
        )
        for module in blocks_of(model).modules()
        if hasattr(module, "is_causal")
    ]
    yield model
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize(
    ("unmixed", "media"),
    [p.values for p in SETTINGS],
    ids=[p.id for p in SETTINGS],
    indirect=["unmixed"],
)
def test_a_token_shows_what_the_picture_has_at_its_place(unmixed, media, request):
    name = request.node.callspec.params["unmixed"]
    arguments = zoo.inputs(name, unmixed, "padded3", media)
    seen = observe(unmixed, arguments, Tower(places=True))
    places = seen.places[seen.mask]
    before = what_the_decoder_sees(unmixed, arguments, None)
    with_place = (~places[:, 0].isnan()).nonzero().flatten()
    tried = with_place[torch.linspace(0, len(with_place) - 1, TOKENS_TRIED).long()].tolist()
    for token in tried:
        disturbed = copy.deepcopy(arguments)
        pixels_at(name, media, disturbed, places[token]).add_(1.0)
        after = what_the_decoder_sees(unmixed, disturbed, None)
        changed = (after - before).abs().amax(dim=-1) > 1e-5
        assert changed.nonzero().flatten().tolist() == [token]


def test_a_shrunk_picture_has_a_smaller_grid():
    base = model_of("llava_onevision").base_model
    arguments = {"image_sizes": torch.tensor([[56, 112]]), "vision_aspect_ratio": "anyres_max_1"}
    places = token_places(PATCH_LAYOUTS["llava_onevision"].image, base, (3, 16), arguments)
    # 4 x 8 tokens are to be 16: both sides are divided by the root of 2.
    assert same(places, lines([SMALL, (2, 5, "row")]))


def test_a_lone_tile_of_several_pictures_is_a_square():
    base = model_of("llava_onevision").base_model
    arguments = {
        "image_sizes": torch.tensor([[56, 112], [56, 56]]),
        "batch_num_images": torch.tensor([2]),
    }
    places = token_places(PATCH_LAYOUTS["llava_onevision"].image, base, (2, 16), arguments)
    square = lines([(4, 4, "end")])
    assert same(places[:17, 1:], square[:, 1:])
    assert same(places[17:, 1:], square[:, 1:])
    assert places[0, 0] != places[17, 0]


def test_llava_with_a_pixtral_tower_has_pictures_of_any_size():
    config = zoo.FAMILIES["llava"].config()
    tower = zoo.FAMILIES["mistral3"].config().vision_config
    config = transformers.LlavaConfig(
        text_config=config.text_config,
        vision_config=tower,
        image_token_index=zoo.IMAGE,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )
    model = transformers.LlavaForConditionalGeneration(config).eval()
    sizes = torch.tensor([[28, 42], [56, 14]])
    arguments = {
        "input_ids": torch.tensor([[1, *[zoo.IMAGE] * (24 + 16), 5, 6]]),
        "pixel_values": torch.randn(2, 3, 56, 42),
        "image_sizes": sizes,
    }
    seen = observe(model, arguments, EVERYTHING)
    assert torch.equal(seen.places[0], lines(plain((4, 6), (8, 2))))
    assert seen.vision_keys.isfinite().all() and seen.vision_scores.isfinite().all()


def test_a_cls_token_among_the_visual_tokens_leaves_no_places():
    config = zoo.FAMILIES["llava"].config()
    config.vision_feature_select_strategy = "full"
    model = transformers.LlavaForConditionalGeneration(config).eval()
    arguments = zoo.inputs("llava", model)
    arguments["input_ids"] = torch.tensor([[1, *[zoo.IMAGE] * 17, 5, 6]])
    del arguments["attention_mask"]
    seen = observe(model, arguments, EVERYTHING)
    assert seen.places is None
    assert seen.vision_keys.shape[:2] == seen.vision_scores.shape == (1, 17)


def test_pictures_of_unknown_shapes_leave_no_places():
    base, to_tokens = model_of("llava").base_model, PATCH_LAYOUTS["llava"].image
    for shape in [(16,), (2, 15)]:
        assert token_places(to_tokens, base, shape, {}) is None
