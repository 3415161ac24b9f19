"""Positions of prompts whose pictures lost tokens: every token stands where it stood in the whole prompt.

vLLM numbers a prompt before its pictures are encoded. Text is numbered as if every picture were whole, so its
positions do not depend on which tokens stay. A picture's token waits as -1 - p, where p is the position at
which its picture begins. Its place in the picture comes later, in columns behind its embedding (`with_places`).

Positions are [3, length]: frame, row and column (M-RoPE), or three times the same number.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

# bfloat16 holds whole numbers up to 256, so a place is written in two digits.
BASE = 256
COLUMNS = 6


@dataclass(frozen=True)
class Picture:
    """Where a picture stands in a prompt.

    where: LongTensor [n], positions of its tokens in the shortened prompt, ascending.
    room: how many positions the whole picture takes.
    """

    where: torch.Tensor
    room: int


def waiting_positions(length: int, pictures: Sequence[Picture]) -> tuple[torch.Tensor, int]:
    """Positions of a prompt whose pictures are not encoded yet.

    Args:
        length: tokens of the shortened prompt.
        pictures: in the prompt's order.

    Returns:
        int64 [3, length], and by how much the next token's position is above `length`.
    """
    step = torch.ones(length, dtype=torch.long)
    waiting = torch.zeros(length, dtype=torch.bool)
    for picture in pictures:
        # All of its room is taken at its last token.
        step[picture.where] = 0
        step[picture.where[-1]] = picture.room
        waiting[picture.where] = True
    after = step.cumsum(0)
    start = after - step
    positions = torch.where(waiting, -1 - start, start)
    return positions.expand(3, -1).contiguous(), int(after[-1]) - length


def with_places(embeddings: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Embeddings [n, size] with the places of their tokens [n, 3] in six more columns."""
    digits = torch.cat([places // BASE, places % BASE], dim=1)
    return torch.cat([embeddings, digits.to(embeddings)], dim=1)


def without_places(embeddings: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What `with_places` joined: embeddings [n, size] and places, int64 [n, 3]."""
    digits = embeddings[:, -COLUMNS:].round().long().cpu()
    return embeddings[:, :-COLUMNS], digits[:, :3] * BASE + digits[:, 3:]


def place_tokens(
    positions: torch.Tensor, where: torch.Tensor, places: torch.Tensor
) -> torch.Tensor:
    """Give tokens of pictures their positions. Doing so twice changes nothing.

    A prompt that was preempted is computed again, and its tokens are placed already.

    Args:
        positions: int64 [3, length], as `waiting_positions` gives them.
        where: LongTensor [k], which tokens.
        places: int64 [k, 3], their places in their pictures.
    """
    positions = positions.clone()
    now = positions[0, where]
    start = torch.where(now < 0, -1 - now, now - places[:, 0])
    positions[:, where] = start + places.T
    return positions
