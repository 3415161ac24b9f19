"""Look at the attention of a layer ahead of its turn, and project no more than the look reads.

Such a look runs the layer's own forward up to its attention. Every token's key is needed, but the queries of
the rows alone, and no value.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

from ...contract import Needs
from ...policy.cost import DecoderCost
from ..tokens.layout import Layout
from ..tokens.present import Tokens
from .rows import at_slots

# What an attention's forward may project beside queries, keys and values: its output.
OUTPUTS = {"o_proj", "out_proj"}


def has_own_projections(attention: nn.Module) -> bool:
    """Whether queries, keys and values come from a projection each, so that each can be left out.

    It is read off the names in the attention's code. Joined projections (Phi-3) and latents (DeepSeek) are of
    another kind, and so is attention that makes anything else of its values.
    """
    names = inspect.unwrap(type(attention).forward).__code__.co_names
    projections = {name for name in names if name.endswith("_proj")} - OUTPUTS
    if projections != {"q_proj", "k_proj", "v_proj"} or any("conv" in name for name in names):
        return False
    return all(isinstance(getattr(attention, name, None), nn.Module) for name in projections)


@contextmanager
def few_projections(
    attention: nn.Module, shape: torch.Size, rows: torch.Tensor | slice | None
) -> Iterator[None]:
    """While this lasts, this thread's forwards of `attention` project few queries and values.

    Those that are left out are not set to anything. Other threads find the attention as it is.

    Args:
        attention: one that `has_own_projections`.
        shape: of the hidden states that it is given, [batch, n, hidden size].
        rows: whose queries are wanted, LongTensor [batch, m] or [1, m], or a slice; None for all.
    """
    handles = _shorten(attention.v_proj, shape, slice(0, 1))
    if rows is not None:
        handles += _shorten(attention.q_proj, shape, rows)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _shorten(projection: Any, shape: torch.Size, rows: torch.Tensor | slice) -> list[Any]:
    """Let a projection see only some rows of what it is given, and put its output in their places."""
    thread = threading.get_ident()

    def is_ours() -> bool:
        # A layer that another thread compiles meanwhile is not to have this in its graph.
        return not torch.compiler.is_dynamo_compiling() and threading.get_ident() == thread

    def take(_: nn.Module, args: tuple[Any, ...]) -> Any:
        return (at_slots(args[0], rows), *args[1:]) if is_ours() else None

    def put(_: nn.Module, __: Any, output: torch.Tensor) -> torch.Tensor | None:
        if not is_ours():
            return None
        whole = output.new_empty(*shape[:2], output.shape[-1])
        if isinstance(rows, slice):
            whole[:, rows] = output
        elif len(rows) == 1:
            whole.index_copy_(1, rows[0].to(whole.device), output)
        else:
            whole.scatter_(1, rows.to(whole.device)[..., None].expand_as(output), output)
        return whole

    return [projection.register_forward_pre_hook(take), projection.register_forward_hook(put)]


class LooksAhead:
    """What the looks ahead of one prefill cost.

    flops: of each prompt, int [batch]. bytes_taken: of all prompts together, by layer.
    """

    def __init__(self, cost: DecoderCost, layout: Layout):
        self._cost, self._layout = cost, layout
        self.flops = np.zeros(len(layout.real), dtype=np.int64)
        self.bytes_taken: dict[int, int] = {}

    def add(
        self, index: int, needs: Needs, tokens: Tokens, columns: int, looked: int, apart: bool
    ) -> None:
        """Count the look at layer `index`.

        Args:
            tokens: those that are present; columns: how many rows the hidden states of all prompts have.
            looked: bytes that the rows' attention took.
            apart: whether no more was projected than is read.
        """
        looks, keys = needs.each(ahead=True), np.array(tokens.lengths)
        kinds = {one.rows for one in looks if one.rows is not None}
        rows = [self._layout.text_rows(kind).mask.sum(axis=1) for kind in kinds]
        few = apart and rows and not any(one.keys for one in looks)
        self.flops = self.flops + self._cost.look_flops(
            keys, np.max(rows, axis=0) if few else keys, 1 if apart else keys, sum(rows)
        )
        self.bytes_taken[index] = self._cost.look_bytes(columns, looked, first=not index)
