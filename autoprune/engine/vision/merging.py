"""Patches merge inside the vision tower, a few after each block, so that later blocks see fewer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...contract import Patches
from ...parts.mergers import leaving_in_round
from .patches import cls_attention, received_attention

# For each prompt, how many visual tokens enter the decoder, and of how many.
Prompts = Sequence[tuple[int, int]]
# As `Method.merge`.
Rule = Callable[[Patches, int], Tensor]
# Attention backends that take a mask which is added to the scores.
ADDING = ("sdpa", "eager")


class MergedPatches:
    """The pictures of one run of the tower, and the tokens that their patches have become.

    After each block but the last, tokens are merged by the method's rule. The next block sees only these, and
    attends to each in proportion to its patches (ToMe, equation 1) where its backend can. The last block's
    output is given back to all patches: the rest of the model finds the shapes it expects. Merging stands
    behind a block, since no hook can come between its attention and its MLP. A CLS token, which comes first,
    is one of the patches here; no other joins it.

    leaving: how many tokens of a picture leave after each block but the last.
    owner: LongTensor [pictures, patches], which token each patch belongs to.
    sizes: float32 [pictures, tokens], patches of each token.
    """

    def __init__(self, hidden: Tensor, leaving: Sequence[int], has_cls: bool):
        pictures, patches = hidden.shape[:2]
        self.leaving, self.first = leaving, int(has_cls)
        self.owner = torch.arange(patches, device=hidden.device).expand(pictures, -1)
        self.sizes = torch.ones(pictures, patches, device=hidden.device)
        # Query, key and scaling of the attention that ran last.
        self._attended: tuple[Tensor, Tensor, float | None] | None = None

    def attended(
        self, backend: str, query: Tensor, key: Tensor, scaling: float | None
    ) -> Tensor | None:
        """A block attends. Returns what is to be added to its scores, [pictures, 1, 1, tokens], if anything."""
        self._attended = query, key, scaling
        if self.sizes.shape == self.owner.shape or backend not in ADDING:
            return None
        return self.sizes.log().to(query)[:, None, None]

    def after_block(self, index: int, rule: Rule, hidden: Tensor) -> Tensor | None:
        """What a block's output [pictures, tokens, size] becomes; None leaves it."""
        if index == len(self.leaving):
            return self.spread(hidden)
        leaving = self.leaving[index]
        if not leaving or self._attended is None:
            return None
        return self._merge(hidden, self._joining(rule, leaving).to(hidden.device), leaving)

    def groups(self) -> Tensor:
        """A number for the token of each patch, float32 [pictures, patches], no two pictures' the same."""
        pictures, tokens = self.sizes.shape
        picture = torch.arange(pictures, device=self.owner.device)
        return (picture[:, None] * tokens + self.owner).float()

    def spread(self, states: Tensor) -> Tensor:
        """Give every patch what its token has: [pictures, ..., tokens, size] to [..., patches, size]."""
        owner = self.owner.to(states.device)
        owner = owner.view(len(owner), *[1] * (states.ndim - 3), -1, 1)
        return states.gather(-2, owner.expand(*states.shape[:-2], -1, states.shape[-1]))

    @torch.no_grad()
    def _joining(self, rule: Rule, leaving: int) -> Tensor:
        """Where each token goes by the rule, LongTensor [pictures, tokens]; itself if it stays."""
        assert self._attended is not None
        (query, key, scaling), self._attended = self._attended, None
        first = self.first
        keys = key.float().mean(dim=1)[:, first:]
        sizes = self.sizes[:, first:].to(key.device)
        attention = partial(self._attention, query, key, scaling)
        into = rule(Patches(keys, sizes, attention, has_cls=bool(first)), leaving)
        _check_joined(into, sizes.shape, leaving)
        return torch.nn.functional.pad(into + first, (first, 0))

    def _merge(self, hidden: Tensor, into: Tensor, leaving: int) -> Tensor:
        """Tokens that go to the same one become their mean, weighted by patches.

        Args:
            hidden: [pictures, tokens, size].
            into: LongTensor [pictures, tokens], as `_joining` gives it.
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

    def _attention(self, query: Tensor, key: Tensor, scaling: float | None) -> Tensor:
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
    if not isinstance(into, Tensor) or into.dtype != torch.int64 or into.shape != shape:
        given = type(into).__name__
        if isinstance(into, Tensor):
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


def plan_merging(
    args: tuple, kwargs: Mapping[str, Any], prompts: Prompts, blocks: int, has_cls: bool
) -> MergedPatches | None:
    """Plan what leaves behind each block, before the first of them runs; None leaves the tower as it is.

    A picture is left with the share of its patches that the decoder will see, all pictures of a run with the
    largest such share of the prompts. A tower whose blocks are given anything beside hidden states (masks,
    positions) is left as it is.

    Args:
        args, kwargs: what the first block is called with.
        prompts: those that the pictures belong to.
        blocks: how many there are, up to the one whose output the decoder receives.
        has_cls: whether a CLS token comes first.
    """
    others = (*args[1:], *kwargs.values())
    if not prompts or torch.compiler.is_dynamo_compiling() or not args:
        return None
    if not all(value is None or isinstance(value, bool | int | float | str) for value in others):
        return None
    patches = args[0].shape[1] - has_cls
    keep = max(-(-patches * kept // total) for kept, total in prompts)
    leaving: list[int] = []
    # The last round is the cut before the decoder.
    for rounds in range(blocks, 1, -1):
        leaving.append(leaving_in_round(patches - sum(leaving), keep, rounds))
    return MergedPatches(args[0], leaving, has_cls) if any(leaving) else None
