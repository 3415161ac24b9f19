"""Pictures and videos in each family's layout: what stands in the prompt, and the pixels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

PAD, BOS, FIRST_WORD, WORDS = 0, 1, 4, 120
IMAGE, VIDEO, START, END = 130, 131, 132, 133
SPECIAL = (PAD, BOS, 2, 3, IMAGE, VIDEO, START, END)
VOCABULARY = 140
LAYERS, HIDDEN, HEADS, HEAD_DIM = 6, 64, 4, 16
GRID_PATCH = 4
Payload = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Visual:
    """One picture or video: its token ids inside the prompt, and what its pixels are called."""

    ids: list[int]
    payload: Payload


def words(count: int, generator: torch.Generator) -> list[int]:
    return torch.randint(FIRST_WORD, WORDS, (count,), generator=generator).tolist()


def images_per_prompt(payloads: list[list[Payload]]) -> Payload:
    """Idefics layout: pixel_values [batch, images, 3, height, width], missing images all zero."""
    shape = next(p["pixel_values"] for prompt in payloads for p in prompt).shape[1:]
    most = max(map(len, payloads))
    pixels = torch.zeros(len(payloads), most, *shape)
    for row, prompt in enumerate(payloads):
        for column, payload in enumerate(prompt):
            pixels[row, column] = payload["pixel_values"][0]
    return {"pixel_values": pixels}


def _pixels(*shape: int) -> Callable[[torch.Generator], torch.Tensor]:
    return lambda generator: torch.randn(shape, generator=generator)


def square(tokens: int, size: int = 56) -> Callable[[int, torch.Generator], Visual]:
    """A family whose pictures all have the same size and number of tokens."""

    def image(which: int, generator: torch.Generator) -> Visual:
        pixels = _pixels(1, 3, size, size)(generator)
        return Visual([START, *[IMAGE] * tokens, END], {"pixel_values": pixels})

    return image


def bare(tokens: int, argument: str = "pixel_values") -> Callable[[int, torch.Generator], Visual]:
    """A picture without start and end tokens around it."""

    def image(which: int, generator: torch.Generator) -> Visual:
        return Visual([IMAGE] * tokens, {argument: _pixels(1, 3, 56, 56)(generator)})

    return image


def padded_patches(which: int, generator: torch.Generator) -> Visual:
    """Flat patches of pictures of any shape, padded to the most; four of them make one token."""
    height, width = [(8, 8), (4, 12), (6, 8)][which]
    pixels = torch.zeros(1, 64, 3 * GRID_PATCH**2)
    pixels[:, : height * width] = _pixels(1, height * width, 3 * GRID_PATCH**2)(generator)
    payload = {
        "pixel_values": pixels,
        "spatial_shapes": torch.tensor([[height, width]]),
        "pixel_attention_mask": (torch.arange(64) < height * width).long()[None],
    }
    return Visual([START, *[IMAGE] * (height * width // 4), END], payload)


def placed_image(which: int, generator: torch.Generator) -> Visual:
    """As `padded_patches`; each patch says where it is, as (x, y)."""
    height, width = [(8, 8), (4, 12), (6, 8)][which]
    visual = padded_patches(which, generator)
    places = torch.full((1, 64, 2), -1)
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    places[0, : height * width] = torch.stack([columns, rows], dim=-1).flatten(0, 1)
    payload = {"pixel_values": visual.payload["pixel_values"], "image_position_ids": places}
    return Visual(visual.ids, payload)


def placed_video(joined: bool) -> Callable[[int, torch.Generator], Visual]:
    """Two frames of `placed_image`, each behind the words of its time stamp.

    Args:
        joined: whether the frames of all videos stand behind each other, as since transformers 5.24.
    """

    def video(which: int, generator: torch.Generator) -> Visual:
        frames = [placed_image(which, generator) for _ in range(2)]
        ids = [
            token
            for frame in frames
            for token in (*words(2, generator), *(VIDEO if i == IMAGE else i for i in frame.ids))
        ]
        pixels, places = (
            torch.cat([frame.payload[name] for frame in frames])
            for name in ("pixel_values", "image_position_ids")
        )
        if not joined:
            return Visual(
                ids, {"pixel_values_videos": pixels[None], "video_position_ids": places[None]}
            )
        payload = {"pixel_values_videos": pixels, "video_position_ids": places}
        return Visual(ids, payload | {"num_frames_per_video": torch.tensor([2])})

    return video


# Crops of 4 x 4 patches: one tile, or two side by side, or two stacked.
CROP, PATCH = 56, 14
PINPOINTS = [[CROP, CROP], [CROP, 2 * CROP], [2 * CROP, CROP]]
# Picture sizes (height, width), their tiles, and the token grid left after the model's unpadding.
_ANYRES = [((56, 56), 1, (4, 4)), ((56, 112), 2, (4, 8)), ((28, 112), 2, (2, 8))]


def anyres_image(which: int, generator: torch.Generator) -> Visual:
    (height, width), tiles, (rows, columns) = _ANYRES[which]
    tokens = 16 + rows * (columns + 1)  # base crop, then the grid with a newline after every row
    payload = {
        "pixel_values": _pixels(1, tiles + 1, 3, CROP, CROP)(generator),
        "image_sizes": torch.tensor([[height, width]]),
    }
    return Visual([IMAGE] * tokens, payload)


def anyres_video(tokens: int) -> Callable[[int, torch.Generator], Visual]:
    def video(which: int, generator: torch.Generator) -> Visual:
        pixels = _pixels(1, 4, 3, CROP, CROP)(generator)
        return Visual([VIDEO] * tokens, {"pixel_values_videos": pixels})

    return video


# Grids (frames, height, width) in patches; four patches make one token.
_GRIDS = [(1, 8, 8), (1, 8, 12), (1, 4, 12)]
_VIDEO_GRIDS = [(2, 4, 8), (2, 4, 6), (3, 4, 6)]


def _patches(grid: tuple[int, int, int], prefix: str, generator: torch.Generator) -> Payload:
    rows = grid[0] * grid[1] * grid[2]
    pixels = "pixel_values" if prefix == "image" else "pixel_values_videos"
    return {
        pixels: _pixels(rows, 3 * 2 * GRID_PATCH**2)(generator),
        f"{prefix}_grid_thw": torch.tensor([grid]),
    }


def grid_image(which: int, generator: torch.Generator) -> Visual:
    t, h, w = _GRIDS[which]
    return Visual(
        [START, *[IMAGE] * (t * h * w // 4), END], _patches((t, h, w), "image", generator)
    )


def patch_image(which: int, generator: torch.Generator) -> Visual:
    """As `grid_image`, its patches not flattened."""
    visual = grid_image(which, generator)
    rows = len(visual.payload["pixel_values"])
    pixels = _pixels(rows, 3, GRID_PATCH, GRID_PATCH)(generator)
    return Visual(visual.ids, visual.payload | {"pixel_values": pixels})


def flat_image(which: int, generator: torch.Generator) -> Visual:
    """As `patch_image`, flattened: there is no second frame."""
    visual = patch_image(which, generator)
    return Visual(
        visual.ids, visual.payload | {"pixel_values": visual.payload["pixel_values"].flatten(1)}
    )


def unmerged_image(which: int, generator: torch.Generator) -> Visual:
    """As `flat_image`; the picture says itself how many of its patches make one token."""
    visual = flat_image(which, generator)
    return Visual(visual.ids, visual.payload | {"image_merge_sizes": torch.tensor([2])})


def grid_video(which: int, generator: torch.Generator) -> Visual:
    t, h, w = _VIDEO_GRIDS[which]
    return Visual(
        [START, *[VIDEO] * (t * h * w // 4), END], _patches((t, h, w), "video", generator)
    )


def paced_video(which: int, generator: torch.Generator) -> Visual:
    """As `grid_video`; it says how many seconds lie between two of its frames."""
    visual = grid_video(which, generator)
    return Visual(visual.ids, visual.payload | {"video_second_per_grid": torch.tensor([1.0])})


def timed_video(token: int) -> Callable[[int, torch.Generator], Visual]:
    """Every frame stands alone, behind the words of its time stamp."""

    def video(which: int, generator: torch.Generator) -> Visual:
        t, h, w = _VIDEO_GRIDS[which]
        ids: list[int] = []
        for _ in range(t):
            ids += [*words(2, generator), START, *[token] * (h * w // 4), END]
        return Visual(ids, _patches((t, h, w), "video", generator))

    return video


def rows_image(which: int, generator: torch.Generator) -> Visual:
    height, width = [(56, 56), (56, 84), (28, 84)][which]
    payload = {
        "pixel_values": _pixels(1, 3, height, width)(generator),
        "image_sizes": torch.tensor([[height, width]]),
    }
    row = [*[IMAGE] * (width // 14), START]
    return Visual([*(row * (height // 14))[:-1], END], payload)


def pooled_image(which: int, generator: torch.Generator) -> Visual:
    """One crop of 4 x 4 patches. The picture says which of them make one token: here two by two, then each."""
    index = torch.arange(16).view(4, 4)
    joined = index.unfold(0, 2, 2).unfold(1, 2, 2).reshape(4, 4)
    pooling = torch.cat([joined, torch.nn.functional.pad(index.reshape(16, 1), (0, 3), value=-1)])
    payload = {
        "pixel_values": _pixels(1, 16, 3 * PATCH**2)(generator),
        "image_token_pooling": pooling,
        "image_grids": torch.tensor([[2, 2, 4, 4]]),
        "image_num_crops": torch.tensor([1]),
    }
    return Visual([START, *[IMAGE] * 20, END], payload)


def join_pooled(payloads: list[list[Payload]]) -> Payload:
    """Pictures of `pooled_image`, whose patches are counted through all of them."""
    pictures = [payload for prompt in payloads for payload in prompt]
    joined = {name: torch.cat([picture[name] for picture in pictures]) for name in pictures[0]}
    patches = pictures[0]["pixel_values"].shape[1]
    pooling = [p["image_token_pooling"] for p in pictures]
    joined["image_token_pooling"] = torch.cat(
        [index.where(index < 0, index + n * patches) for n, index in enumerate(pooling)]
    )
    return joined
