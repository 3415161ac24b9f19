"""Places of a picture's tokens on its grid, as Qwen's models number them."""

from __future__ import annotations

from typing import ClassVar

import torch

from .pruning import PrunesPictures


class PrunesGrids(PrunesPictures):
    """Stands before Qwen's classes: a picture's tokens have a frame, a row and a column."""

    tower: ClassVar[str] = "visual"

    def places(self, number: int, grid: torch.Tensor | None) -> torch.Tensor:
        assert grid is not None
        merge = self.config.vision_config.spatial_merge_size
        frames, rows, columns = grid.flatten().tolist()
        return torch.cartesian_prod(
            torch.arange(frames), torch.arange(rows // merge), torch.arange(columns // merge)
        )
