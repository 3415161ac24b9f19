"""Quotas of a prompt's pictures: what a user gives, and the ranking that keeps them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real
from typing import Any, Literal

import torch

from ..contract import Observation, PromptState
from ..parts.pictures import by_picture, picture_of, totals
from ..parts.scorers import text_attention, vision_attention
from ..parts.selectors import required_first

PerPicture = Literal["equal", "attention"] | tuple[float, ...]


def checked_shares(given: Any) -> PerPicture | None:
    """The setting, with numbers as a tuple.

    Raises:
        ValueError: it is neither one of the names nor shares of which one is above 0.
    """
    if given is None or (isinstance(given, str) and given in ("equal", "attention")):
        return given  # type: ignore[return-value]
    if isinstance(given, (list, tuple)) and any(given) and all(map(_is_share, given)):
        return tuple(float(share) for share in given)
    raise ValueError(
        'per_picture must be "equal", "attention", or the pictures\' shares in their order, such as '
        f"(2, 1, 1), finite and 0 or more with one above 0, got {given!r}"
    )


def _is_share(value: Any) -> bool:
    number = isinstance(value, Real) and not isinstance(value, bool)
    return number and 0 <= value < math.inf


def check_number_of_shares(given: PerPicture | None, state: PromptState) -> None:
    """Raise ValueError unless there are as many shares as any prompt has pictures."""
    if not isinstance(given, tuple):
        return
    for prompt, sizes in enumerate(_sizes(state)):
        if sizes and len(sizes) != len(given):
            raise ValueError(
                f"per_picture gives {len(given)} shares, but prompt {prompt} of the batch has {len(sizes)} "
                f'pictures; give one share for each picture, or per_picture="equal"'
            )


def ranked_by_picture(
    scores: torch.Tensor, given: PerPicture, seen: Observation, state: PromptState
) -> torch.Tensor:
    """Scores [batch, V] by which every cut gives each picture its quota.

    "attention" takes the attention that the text pays to what is left of each picture at this cut, or the
    vision tower's where that is all that is seen.
    """
    sizes = _sizes(state)
    most = max(map(len, sizes))
    picture = picture_of(seen.index, sizes).to(scores.device)
    if given == "attention":
        attention = text_attention(seen) if seen.attention is not None else vision_attention(seen)
        assert attention is not None
        shares = totals(attention.to(scores.device), picture, most)
    elif given == "equal":
        shares = scores.new_ones(len(scores), most)
    else:
        # Only their proportions matter, and a scores' dtype does not have every number.
        scaled = [share / max(given) for share in given]
        shares = torch.tensor(scaled, device=scores.device).expand(len(scores), -1)
    return by_picture(required_first(scores, seen), picture, shares)


def _sizes(state: PromptState) -> Sequence[Sequence[int]]:
    """Visual tokens of each picture; where that is not known, those of a prompt are one picture's."""
    prompts = state.prompts
    return prompts.pictures or [[number] if number else [] for number in prompts.num_visual]
