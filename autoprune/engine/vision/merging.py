"""Patches merge inside the vision tower, a few after each block, so that later blocks see fewer."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial, wraps
from typing import Any

import numpy as np
import torch
from torch import nn

from ...contract import Patches
from ...parts.mergers import leaving_in_round
from ..cover import Around
from ..locate import tower_attentions
from .patches import cls_attention, received_attention

# As `Method.merge`.
Rule = Callable[[Patches, int], torch.Tensor]
# What `generate` computes picture features with, ahead of the forward.
ENCODES = "_maybe_prepare_encoder_kwargs_for_generation"
# Attention backends that take a mask which is added to the scores.
ADDING = ("sdpa", "eager")


class Merged:
    """The pictures of one run of the tower, and the tokens that their patches have become.

    A CLS token, which comes first, is one of the patches here; no other joins it.

    leaving: how many tokens of a picture leave after each block.
    owner: LongTensor [pictures, patches], which token each patch belongs to.
    sizes: float32 [pictures, tokens], patches of each token.
    shown: query, key and scaling of the attention that ran last.
    """

    def __init__(self, hidden: torch.Tensor, leaving: Sequence[int], has_cls: bool):
        pictures, patches = hidden.shape[:2]
        self.leaving, self.first = leaving, int(has_cls)
        self.owner = torch.arange(patches, device=hidden.device).expand(pictures, -1)
        self.sizes = torch.ones(pictures, patches, device=hidden.device)
        self.shown: tuple[torch.Tensor, torch.Tensor, float | None] | None = None

    def log_sizes(self, query: torch.Tensor) -> torch.Tensor:
        """Added to the scores it makes attention proportional to patches: [pictures, 1, 1, tokens]."""
        return self.sizes.log().to(query)[:, None, None]

    def groups(self) -> torch.Tensor:
        """A number for the token of each patch, float32 [pictures, patches], no two pictures' the same."""
        pictures, tokens = self.sizes.shape
        picture = torch.arange(pictures, device=self.owner.device)
        return (picture[:, None] * tokens + self.owner).float()

    def spread(self, states: torch.Tensor) -> torch.Tensor:
        """Give every patch what its token has: [pictures, ..., tokens, size] to [..., patches, size]."""
        owner = self.owner.to(states.device)
        owner = owner.view(len(owner), *[1] * (states.ndim - 3), -1, 1)
        return states.gather(-2, owner.expand(*states.shape[:-2], -1, states.shape[-1]))

    @torch.no_grad()
    def joining(self, rule: Rule, leaving: int) -> torch.Tensor:
        """Where each token goes by the rule, LongTensor [pictures, tokens]."""
        assert self.shown is not None
        (query, key, scaling), self.shown = self.shown, None
        first = self.first
        keys = key.float().mean(dim=1)[:, first:]
        sizes = self.sizes[:, first:].to(key.device)
        attention = partial(self._attention, query, key, scaling)
        into = rule(Patches(keys, sizes, attention, has_cls=bool(first)), leaving)
        _check_joined(into, sizes.shape, leaving)
        return torch.nn.functional.pad(into + first, (first, 0))

    def merge(self, hidden: torch.Tensor, into: torch.Tensor, leaving: int) -> torch.Tensor:
        """Tokens that go to the same one become their mean, weighted by patches.

        Args:
            hidden: [pictures, tokens, size].
            into: LongTensor [pictures, tokens], where each goes; itself if it stays.
        """
        sizes, owner = self.sizes.to(hidden.device), self.owner.to(hidden.device)
        stays = into == torch.arange(into.shape[1], device=into.device)
        slot = (stays.cumsum(dim=1) - 1).gather(1, into)
        left = hidden.shape[1] - leaving
        weighted = hidden.float() * sizes[..., None]
        total = weighted.new_zeros(len(hidden), left, hidden.shape[2])
        total = total.scatter_add(1, slot[..., None].expand_as(weighted), weighted)
        self.sizes = sizes.new_zeros(len(hidden), left).scatter_add(1, slot, sizes)
        self.owner = slot.gather(1, owner)
        return (total / self.sizes[..., None]).to(hidden)

    def _attention(self, query, key, scaling) -> torch.Tensor:
        """Attention of a patch of each token [pictures, tokens], the CLS token aside."""
        first, key = self.first, self.spread(key)
        if first:
            attention = cls_attention(query, key, scaling)
        else:
            attention = received_attention(self.spread(query), key, scaling)
        # The same for all patches of a token.
        tokens = attention.new_zeros(len(attention), self.sizes.shape[1] - first)
        return tokens.scatter(1, self.owner.to(attention.device)[:, first:] - first, attention)


def _check_joined(into: Any, shape: torch.Size, leaving: int) -> None:
    """Raise ValueError if that is not what `Method.merge` must return.

    Where the tokens go is looked at on a CPU alone: on a GPU the host would wait for each block.
    """
    if not isinstance(into, torch.Tensor) or into.dtype != torch.int64 or into.shape != shape:
        given = type(into).__name__
        if isinstance(into, torch.Tensor):
            given = f"{into.dtype} {list(into.shape)}"
        raise ValueError(
            f"Method.merge must return a LongTensor {list(shape)}, the position of the token that each "
            f"one joins, got {given}"
        )
    if into.device.type != "cpu":
        return
    joined = into.numpy()
    there_is = ((joined >= 0) & (joined < shape[1])).all()
    stays = joined == np.arange(shape[1])
    count = (~stays).sum(axis=1)
    if not there_is or (count != leaving).any() or not np.take_along_axis(stays, joined, 1).all():
        raise ValueError(
            f"Method.merge must let exactly {leaving} of {shape[1]} tokens of each picture join others, all of "
            f"which stay; it let {count.tolist()} join, or some join one that leaves or does not exist"
        )


class TowerMerging:
    """Lets a method merge patches in one model's tower.

    After each block but the last, tokens are merged by the method's rule. The next block sees only these,
    and attends to each in proportion to its patches (ToMe, equation 1) where its backend can. The last
    block's output is given back to all patches: the rest of the model finds the shapes it expects. Merging
    stands behind a block, since no hook can come between its attention and its MLP.

    A picture is left with the share of its patches that the decoder will see, all pictures of a run
    with the largest such share of the prompts, and with what one more round would take. So it has to
    be known what the prompts keep (`expect`); and a tower whose blocks are given anything beside hidden
    states (masks, positions) is left as it is. What belongs to a run is kept per thread.

    Args:
        rule: the method's `merge`.
        blocks: the tower's, up to the one whose output the decoder receives; none for no merging.
        has_cls: whether a CLS token comes first.
    """

    def __init__(self, rule: Rule, blocks: Sequence[nn.Module], has_cls: bool):
        self.rule, self.blocks, self.has_cls = rule, blocks, has_cls
        self.attentions = tower_attentions(blocks)
        self._local = threading.local()

    @property
    def merged(self) -> Merged | None:
        """What the run that is under way in this thread has merged."""
        return getattr(self._local, "merged", None)

    def reset(self) -> None:
        """Drop what is left of runs that did not come to their end."""
        self._local = threading.local()

    def expect(self, prompts: Sequence[tuple[int, int]]) -> None:
        """How many visual tokens enter the decoder, and of how many, for the prompts of the next run."""
        self._local.expected = prompts

    def forget(self) -> None:
        """There is no next run that belongs to prompts."""
        self._local.expected = ()

    @contextmanager
    def running(self, allowed: bool) -> Iterator[None]:
        """One computation of features, by the prompts that were expected."""
        local = self._local
        expected, local.expected = getattr(local, "expected", ()), ()
        local.prompts = expected if allowed else ()
        try:
            yield
        finally:
            local.prompts, local.merged = (), None

    def see(self, module, query, key, attention_mask, scaling=None, **kwargs) -> Any:
        """A block attends; returns the mask it is to do so with."""
        merged = self.merged
        if merged is None or module not in self.attentions:
            return attention_mask
        merged.shown = query, key, scaling
        unmerged = merged.sizes.shape == merged.owner.shape
        if unmerged or module.config._attn_implementation not in ADDING:
            return attention_mask
        return merged.log_sizes(query)

    def enter(self, args: tuple, kwargs: dict) -> None:
        """Before the first block: plan what leaves behind each."""
        self._local.merged = None
        prompts = getattr(self._local, "prompts", ())
        if not prompts or torch.compiler.is_compiling() or not _only_hidden_states(args, kwargs):
            return
        patches = args[0].shape[1] - self.has_cls
        keep = max(-(-patches * kept // total) for kept, total in prompts)
        # The last round is the cut before the decoder.
        leaving = _evenly(patches, keep, len(self.blocks))[:-1]
        if any(leaving):
            self._local.merged = Merged(args[0], leaving, self.has_cls)

    def after(self, index: int, output: Any) -> Any:
        """What a block's output becomes; None leaves it."""
        merged = self.merged
        if merged is None:
            return None
        if index == len(self.blocks) - 1:
            self._local.merged = None
            return merged.spread(output)
        leaving = merged.leaving[index]
        if not leaving or merged.shown is None:
            return None
        into = merged.joining(self.rule, leaving).to(output.device)
        return merged.merge(output, into, leaving)


def has_pixels(arguments: Mapping[str, Any]) -> bool:
    """Whether a model is given pictures or videos that its tower has not seen yet."""
    return any(
        name.startswith("pixel_values") and value is not None for name, value in arguments.items()
    )


def watch_encoding(
    tell: Callable[[torch.Tensor, Any], None], forget: Callable[[], None]
) -> dict[str, Around]:
    """Have `model.generate` tell its prompt, ids and mask, before it computes picture features (`Cover`).

    The prompt is read from the device once more then, which only methods that merge in the tower ask for.
    Releases before 5.19 compute the features in the forward.
    """

    def around(encode: Callable) -> Callable:
        @wraps(encode)
        def watched(inputs, model_kwargs, model_input_name, *args, **kwargs):
            if model_input_name == "input_ids" and has_pixels(model_kwargs):
                tell(inputs, model_kwargs.get("attention_mask"))
            try:
                return encode(inputs, model_kwargs, model_input_name, *args, **kwargs)
            finally:
                forget()

        return watched

    return {ENCODES: around}


def _evenly(patches: int, keep: int, rounds: int) -> list[int]:
    """How many patches leave in each round."""
    leaving: list[int] = []
    for done in range(rounds):
        leaving.append(leaving_in_round(patches - sum(leaving), keep, rounds - done))
    return leaving


def _only_hidden_states(args: tuple, kwargs: dict) -> bool:
    """Whether a block is given nothing that belongs to single patches, beside its first argument."""
    others = (*args[1:], *kwargs.values())
    return bool(args) and all(
        value is None or isinstance(value, bool | int | float | str) for value in others
    )
