"""What the decoder sees of pictures: whole ones, tiles, frames, and which visual token stands where."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

# Pixels along the side at which tiles are compared with the picture, and the mean difference of a channel,
# of 255, from which on they do not look like it.
_COMPARED, _UNLIKE = 32, 30.0


@dataclass(frozen=True)
class View:
    """A picture as the decoder has it.

    Attributes:
        image: what is drawn.
        tokens: int [rows, columns], index 0..N-1 of the visual token at each place; -1 where there is none.
    """

    image: Image.Image
    tokens: NDArray[np.int64]

    @classmethod
    def whole(cls, image: Image.Image, grid: tuple[int, int], first: int = 0) -> View:
        """A picture whose tokens stand row by row, from the visual token `first` on."""
        rows, columns = grid
        return cls(image, first + np.arange(rows * columns).reshape(rows, columns))

    def of_tokens(self, values: NDArray[np.generic], missing: float | bool) -> NDArray[np.generic]:
        """Values [N] laid out as the picture, [rows, columns]; `missing` where there is no token."""
        laid_out: NDArray[np.generic] = np.where(self.tokens >= 0, values[self.tokens], missing)
        return laid_out


def views_of(images: Sequence[Image.Image], places: NDArray[np.float32]) -> list[View]:
    """One view per picture, tile or frame.

    Args:
        images: as many as `places` names, in the order of its numbers. They may have any size: a grid is
            laid over the whole of each.
        places: float [N, 3], picture, row and column of each visual token; NaN for tokens without a patch
            (`Looked.places`).

    Raises:
        ValueError: other images than the places name.
    """
    here = ~np.isnan(places).any(axis=1)
    numbers = np.unique(places[here, 0])
    if len(numbers) != len(images):
        raise ValueError(
            f"the visual tokens lie on {len(numbers)} pictures, tiles or frames, got {len(images)} images; "
            "give one for each, in their order"
        )
    views = []
    for number, image in zip(numbers, images, strict=True):
        index = np.flatnonzero(here & (places[:, 0] == number))
        row, column = places[index, 1].astype(int), places[index, 2].astype(int)
        tokens = np.full((row.max() + 1, column.max() + 1), -1)
        tokens[row, column] = index
        views.append(View(image, tokens))
    return views


def join_tiles(views: Sequence[View], original: Image.Image) -> list[View]:
    """Put the tiles of one picture together again.

    Models that cut a picture into tiles put them row by row, with a small version of the whole picture
    before or behind them, or without. How many rows there are is not asked of the model: of all
    arrangements the one is taken that looks most like the picture.

    Returns:
        The joined tiles, then the small version if there is one. Views that in no arrangement look like
        the picture stay as they are.
    """
    if len({(view.tokens.shape, view.image.size) for view in views}) != 1 or len(views) < 2:
        return list(views)
    wanted = _small(original)
    arrangements = sorted(
        (max(_unlike(view, wanted) for view in arrangement), number, arrangement)
        for number, arrangement in enumerate(_arrangements(views))
    )
    unlike, _, best = arrangements[0]
    return list(views) if unlike > _UNLIKE else best


def _arrangements(views: Sequence[View]) -> Iterator[list[View]]:
    """Every way in which these may be tiles, those with a small version first."""
    for whole, tiles in (([views[-1]], views[:-1]), ([views[0]], views[1:]), ([], views)):
        for rows in range(1, len(tiles) + 1):
            if len(tiles) % rows == 0:
                yield [_joined(tiles, rows), *whole]


def _joined(tiles: Sequence[View], rows: int) -> View:
    columns = len(tiles) // rows
    width, height = tiles[0].image.size
    sheet = Image.new("RGB", (columns * width, rows * height))
    for index, tile in enumerate(tiles):
        sheet.paste(tile.image, (index % columns * width, index // columns * height))
    grid = [
        [tile.tokens for tile in tiles[row * columns : (row + 1) * columns]] for row in range(rows)
    ]
    return View(sheet, np.block(grid))


def _small(image: Image.Image) -> NDArray[np.float64]:
    small = image.convert("RGB").resize((_COMPARED, _COMPARED), Image.Resampling.BOX)
    return np.asarray(small, dtype=np.float64)


def _unlike(view: View, wanted: NDArray[np.float64]) -> float:
    """The mean difference of a channel, to a whole number so that noise does not decide."""
    return float(np.round(np.abs(_small(view.image) - wanted).mean()))
