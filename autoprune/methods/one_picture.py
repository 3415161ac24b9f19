"""A method that cuts before the decoder, applied to the tensors of one picture, without the engine."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ..contract import ModelShape, Observation, Prompts, PromptState, Selection
from ..policy.cost import DecoderCost
from .base import Method, PreDecoder

# A method before the decoder asks nothing of the decoder's size where its schedule is given.
_NO_COST = DecoderCost(1, 1, 1, 1, 1, 1)


def prune_picture(
    method: PreDecoder,
    embeddings: torch.Tensor,
    count: int,
    seen: Mapping[str, torch.Tensor],
    has_cls: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What a method keeps of one picture. An engine that is not transformers calls this.

    It is what the method does to a prompt with this one picture. The method's own budget is not looked at.

    Args:
        method: a method that passed `check_one_picture`.
        embeddings: [N, size], the picture's tokens as the decoder receives them, in their order.
        count: how many of them are to be left, from 1 to N.
        seen: what was seen of the vision tower, [N, ...] each, by the names of `Observation`: those that
            `method.tower()` asks for, and `vision_padding` where the picture was padded.
        has_cls: whether the vision tower has a CLS token.

    Returns:
        LongTensor [count], ascending: which tokens stay. And their embeddings [count, size], which differ
        from those given where the method merges the others into them.

    Raises:
        ValueError: the method needs what was not seen, or the count is below 1 or above N.
    """
    number = len(embeddings)
    if not 1 <= count <= number:
        raise ValueError(f"count must be from 1 to {number}, the picture's tokens, got {count}")
    if count == number:
        return torch.arange(number, device=embeddings.device), embeddings
    selection = _select(method, embeddings, count, seen, has_cls)
    kept = selection.kept[0].to(embeddings.device)
    return kept, embeddings[kept] if selection.states is None else selection.states[0]


def check_one_picture(method: Method) -> None:
    """Raise ValueError if a method cannot be applied to each picture alone, before the prompt is known."""
    why = None
    if not isinstance(method, PreDecoder):
        why = "it cuts inside the decoder"
    elif method.tower().merge:
        why = "it merges patches inside the vision tower"
    elif method.summary is not None:
        why = "a summary of the dropped tokens changes the decoder's attention; use merger=None"
    else:
        selection = _try_out(method)
        if selection is None:
            why = "it looks at the prompt's text"
        elif selection.sizes is not None:
            why = "sizes of merged tokens change the decoder's attention; use proportional=False"
    if why is not None:
        raise ValueError(f"{method.name} cannot prune a picture before its prompt is known: {why}")


def _select(
    method: PreDecoder,
    embeddings: torch.Tensor,
    count: int,
    seen: Mapping[str, torch.Tensor],
    has_cls: bool = False,
) -> Selection:
    number, device = len(embeddings), embeddings.device
    shape = ModelShape(1, _NO_COST, has_vision_scores=True, has_cls=has_cls)
    state = PromptState(shape, Prompts([number], [0]), schedule=[[count]])
    observation = Observation(
        cut=0,
        counts=[number],
        index=torch.arange(number, device=device)[None],
        mask=torch.ones(1, number, dtype=torch.bool, device=device),
        hidden=lambda: embeddings[None],
        text_mask=torch.ones(1, 1, dtype=torch.bool, device=device),
        text_hidden=_no_text,
        **{name: values[None] for name, values in seen.items()},  # type: ignore[arg-type]
    )
    selection = method.select(observation, state)
    assert selection is not None
    return selection


class _TextWanted(Exception):
    """A method looked at the text."""


def _no_text() -> torch.Tensor:
    raise _TextWanted


def _try_out(method: PreDecoder) -> Selection | None:
    """What it selects of a picture of 4 x 4 tokens; None if it looks at the text."""
    side = torch.arange(4.0)
    places = torch.stack([torch.zeros(16), side.repeat_interleave(4), side.repeat(4)], dim=1)
    features, scores = torch.eye(16), torch.arange(1.0, 17.0)
    names = ("vision_scores", "vision_received", "vision_middle")
    seen = dict.fromkeys(names, scores) | {"vision_keys": features, "places": places}
    try:
        return _select(method, features, 8, seen)
    except _TextWanted:
        return None
