"""What the pruned classes of all families have in common: fewer embeddings, and positions that stay."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch

from autoprune.methods.base import PreDecoder
from autoprune.methods.one_picture import prune_picture

from .families import family_of
from .positions import (
    Picture,
    place_tokens,
    waiting_positions,
    with_places,
    without_places,
)
from .processing import COUNTS
from .server_config import ROOM, has_plain_table
from .settings import KEY, Settings
from .tower import TowerTap, at


class PrunesPictures:
    """Stands before one of vLLM's model classes and prunes the pictures that it encodes.

    tower: name of the class's vision tower.
    keeps_positions: whether vLLM asks for positions; not where they are compacted.
    """

    tower: ClassVar[str] = "vision_tower"
    supports_mrope: ClassVar[Literal[True]] = True
    supports_multimodal_pruning: ClassVar[Literal[True]] = True
    supported_video_pruning_methods: ClassVar[tuple[str, ...]] = ()
    supports_encoder_cudagraph: ClassVar[bool] = False
    keeps_positions: bool
    method: PreDecoder
    config: Any

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        config = vllm_config.model_config.hf_config
        text = config.get_text_config()
        self.family, settings = family_of(config), Settings.of(getattr(config, KEY, {}))
        room = ROOM if self.family.plain_rope and has_plain_table(text) else 1
        text.max_position_embeddings *= room
        try:
            super().__init__(vllm_config=vllm_config, prefix=prefix)
        finally:
            text.max_position_embeddings //= room
        self.keeps_positions = settings.method.positions == "original"
        self.image_token = _image_token(config)
        self.text_size = text.hidden_size
        self.prune_by(settings.method)
        if self.keeps_positions:
            # What makes vLLM's runner ask for positions of pictures that are encoded. No video is pruned.
            vllm_config.model_config.multimodal_config.video_pruning_rate = 1e-9

    def prune_by(self, method: PreDecoder) -> None:
        """Set the method that decides which tokens stay. What was encoded before is not encoded anew."""
        self.method = method
        self.tap = TowerTap(self.config, getattr(self, self.tower), method.tower())

    def places(self, number: int, grid: torch.Tensor | None) -> torch.Tensor:
        """Where a whole picture's tokens stand from its first position on, int64 [number, 3].

        Args:
            number: tokens of the whole picture.
            grid: the picture's frames, rows and columns of patches, for families that have them.
        """
        return torch.arange(number)[:, None].expand(-1, 3)

    @torch.no_grad()
    def embed_multimodal(self, **kwargs: Any) -> Any:
        """The embeddings of the tokens that stay, [n, size] for each picture, with their places behind."""
        counts = kwargs.pop(COUNTS, None)
        if counts is None:
            return super().embed_multimodal(**kwargs)  # type: ignore[misc]
        pruned = bool((counts[:, 0] < counts[:, 1]).any())
        with self.tap.watch(kwargs, pruned) as call:
            whole = super().embed_multimodal(**kwargs)  # type: ignore[misc]
        # The attention of pictures that stay whole need not be computed.
        seen, start, kept = self.tap.seen(call) if pruned else {}, 0, []
        grids = kwargs.get("image_grid_thw")
        for i, (picture, (count, number)) in enumerate(zip(whole, counts.tolist(), strict=True)):
            if len(picture) != number:
                raise RuntimeError(
                    f"autoprune: a picture of {number} tokens got {len(picture)} embeddings"
                )
            grid = None if grids is None else torch.as_tensor(grids)[i]
            kept.append(self._pruned(picture, count, at(seen, start, start + number), grid))
            start += number
        return tuple(kept)

    def _pruned(
        self,
        picture: torch.Tensor,
        count: int,
        seen: dict[str, torch.Tensor],
        grid: torch.Tensor | None,
    ) -> torch.Tensor:
        """One picture's embeddings [number, size], less those of the tokens that go."""
        # Qwen3-VL puts what its deeper layers are given behind the embeddings.
        size = self.text_size
        has_cls = self.tap.parts.has_cls
        kept, states = prune_picture(self.method, picture[:, :size], count, seen, has_cls)
        states = torch.cat([states.to(picture), picture[kept, size:]], dim=1)
        if not self.keeps_positions:
            return states
        return with_places(states, self.places(len(picture), grid)[kept.cpu()])

    def get_mrope_input_positions(
        self, input_tokens: Sequence[int], mm_features: Sequence[Any]
    ) -> tuple[torch.Tensor, int]:
        """Positions of a prompt before its pictures are encoded; see `positions`."""
        pictures = []
        for feature in sorted(mm_features, key=lambda feature: feature.mm_position.offset):
            place, data = feature.mm_position, feature.data
            where = torch.arange(place.length)
            if place.is_embed is not None:
                where = where[place.is_embed.cpu()]
            number = int(data[COUNTS].data.flatten()[1])
            grid = data["image_grid_thw"].data if "image_grid_thw" in data else None
            room = 1 + int(self.places(number, grid).max())
            pictures.append(Picture(place.offset + where, room))
        return waiting_positions(len(input_tokens), pictures)

    def recompute_mrope_positions(
        self,
        input_ids: Any,
        multimodal_embeddings: Sequence[torch.Tensor],
        mrope_positions: torch.Tensor,
        num_computed_tokens: int,
        **_: Any,
    ) -> tuple[list[torch.Tensor], torch.Tensor, int]:
        """Positions of the pictures' tokens in this part of a prompt, and the embeddings alone."""
        parts = [without_places(embeddings) for embeddings in multimodal_embeddings]
        positions = mrope_positions
        if parts:
            places = torch.cat([place for _, place in parts]).to(positions.device)
            ids = torch.as_tensor(input_ids, device=positions.device)
            visual = (ids == self.image_token).nonzero().flatten()
            visual = visual[visual >= num_computed_tokens][: len(places)]
            positions = place_tokens(positions, visual, places)
        # A prompt ends with text, so its last token is placed from the start.
        delta = int(positions[:, -1].max()) + 1 - positions.shape[1]
        return [embeddings for embeddings, _ in parts], positions, delta


class PrunesPlainRope(PrunesPictures):
    """The same where a position is one number.

    vLLM hands over three rows, which are equal. The decoder takes one.
    """

    def forward(self, input_ids: Any, positions: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        one = positions[0] if positions.ndim == 2 else positions
        return super().forward(input_ids, one, *args, **kwargs)  # type: ignore[misc]


def _image_token(config: Any) -> int:
    names = ("image_token_id", "image_token_index")
    return next(getattr(config, name) for name in names if hasattr(config, name))
