"""Attention kernels that need a GPU or a compiler, stood in for on the CPU.

Only the kernels are replaced. transformers' own code around them runs as it is: what it makes of the
mask, how it unpads, when it takes position ids for packed sequences, how it counts a sliding window.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import nn
from torch.nn.attention import flex_attention as torch_flex
from transformers import masking_utils
from transformers import modeling_flash_attention_utils as flash_utils
from transformers.integrations import flex_attention as flex_utils


@contextlib.contextmanager
def flash_attention(model: nn.Module) -> Iterator[list[str]]:
    """The whole model, vision tower included, on flash attention 2 with `flash_attn`'s conventions.

    Its value lists the causal kernels as they are called: "dense" or "varlen".
    """
    calls: list[str] = []
    kernels = (_counted(_flash, "dense", calls), _counted(_flash_varlen, "varlen", calls))
    functions = (*kernels, None, flash_utils._pad_input, flash_utils._unpad_input)
    with pytest.MonkeyPatch.context() as patch, _implementation(model, "flash_attention_2"):
        patch.setattr(flash_utils, "_lazy_imports", lambda *_, **__: functions)
        patch.setattr(flash_utils, "_loaded_implementation", None)
        yield calls


@contextlib.contextmanager
def flex_attention(model: nn.Module) -> Iterator[None]:
    """The decoder on flex attention, computed by its plain formula instead of a compiled kernel."""

    def attention(query, key, value, training=False, **kwargs):
        return torch_flex.flex_attention(query, key, value, **kwargs)

    def block_mask(*args, _compile=None, **kwargs):
        return torch_flex.create_block_mask(*args, **kwargs)

    text = model.get_decoder()
    with pytest.MonkeyPatch.context() as patch, _implementation(text, "flex_attention"):
        patch.setattr(flex_utils, "compile_friendly_flex_attention", attention)
        patch.setattr(masking_utils, "create_block_mask", block_mask)
        patch.setattr(torch_flex, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
        yield


@contextlib.contextmanager
def _implementation(model: nn.Module, name: str) -> Iterator[None]:
    # `set_attn_implementation` would refuse, since the real kernels are not installed.
    configs = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}.values()
    before = [(config, config._attn_implementation) for config in configs]
    try:
        for config in configs:
            config._attn_implementation = name
        yield
    finally:
        for config, previous in before:
            config._attn_implementation = previous


def _counted(kernel: Callable, name: str, calls: list[str]) -> Callable:
    @functools.wraps(kernel)
    def counted(*args, causal=False, **kwargs):
        if causal:
            calls.append(name)
        return kernel(*args, causal=causal, **kwargs)

    return counted


def _flash(q, k, v, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0):
    """q [batch, queries, heads, width], k and v [batch, keys, key heads, width]: `flash_attn_func`."""
    groups = q.shape[2] // k.shape[2]
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    scores = q @ k.transpose(-1, -2) * (softmax_scale or q.shape[-1] ** -0.5)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    queries, keys = scores.shape[-2:]
    # The last query stands at the last key.
    offset = torch.arange(keys) - torch.arange(keys - queries, keys)[:, None]
    blocked = (offset > 0) if causal else torch.zeros_like(offset, dtype=torch.bool)
    left, right = window_size
    if left >= 0:
        blocked = blocked | (offset < -left)
    if right >= 0:
        blocked = blocked | (offset > right)
    weights = scores.masked_fill(blocked, -torch.inf).softmax(dim=-1)
    return (weights @ v).transpose(1, 2)


def _flash_varlen(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
):
    """Sequences without padding, one behind the other: `flash_attn_varlen_func`."""
    out = torch.zeros_like(q)
    ends = zip(cu_seqlens_q.tolist(), cu_seqlens_k.tolist(), strict=True)
    first_q, first_k = next(ends)
    for last_q, last_k in ends:
        rows, columns = slice(first_q, last_q), slice(first_k, last_k)
        out[rows] = _flash(
            q[None, rows],
            k[None, columns],
            v[None, columns],
            softmax_scale,
            causal,
            window_size,
            softcap,
        )[0]
        first_q, first_k = last_q, last_k
    return out
