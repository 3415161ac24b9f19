"""What cannot be right is refused before it runs, with the cause and the way out."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import nn
from torch._dynamo import OptimizedModule

from ..contract import MethodContract, Needs
from ..errors import UnsupportedError
from .attention.temperature import counts_positions
from .cache.argument import cache_of, is_paged
from .cache.static import is_static
from .locate import Located, refuse_compiled


def refuse_mode(model: nn.Module, arguments: dict[str, Any] | None = None) -> None:
    """Training mode, and continuous batching."""
    if model.training:
        raise UnsupportedError("the model is in training mode; call model.eval() to prune it")
    if arguments is not None and is_paged(cache_of(arguments)):
        raise UnsupportedError(
            "continuous batching cannot be combined with pruning; use model.generate"
        )


def refuse_hybrid(method: MethodContract, located: Located) -> None:
    """What counts all layers as alike, where some pass a state on instead of attending."""
    if not located.is_hybrid:
        return
    asked = {
        "a summary of dropped tokens": (method.summary is not None, "no summary"),
        "compacted positions": (method.positions != "original", "positions='original'"),
    }
    for what, (wanted, instead) in asked.items():
        if wanted:
            raise UnsupportedError(
                f"{what} needs layers that are all alike, but {type(located.text).__name__} has "
                f"{located.attentions.count(None)} layers that do not attend; use {instead}"
            )


def refuse_speed(method: MethodContract, located: Located) -> None:
    """A number of cuts that follows from what a layer costs, where layers differ in that."""
    if method.needs_speed and (differs := located.cost.differs):
        raise UnsupportedError(
            f"cut_every='auto' needs layers that are all alike, but {differs}; use a number"
        )


def refuse_sizes_in_hybrid(located: Located) -> NoReturn:
    """A layer that passes a state on has no scores to which a token's size could be added."""
    raise UnsupportedError(
        f"{located.attentions.count(None)} layers of {type(located.text).__name__} do not attend, so they "
        "cannot count a token for several, as sizes of merged tokens need; use a method that merges nothing"
    )


def refuse_unseen_layer(located: Located, layer: int, cut: int, needs: Needs, ahead: bool) -> None:
    """A cut that is decided by the attention of a layer that has none."""
    looks = needs.each(ahead)
    if located.attentions[layer] is not None or not any(n.rows or n.keys for n in looks):
        return
    seen = [str(number) for number, one in enumerate(located.attentions) if one is not None]
    raise UnsupportedError(
        f"the cut before layer {cut} is decided by the attention of layer {layer}, which has none: of the "
        f"layers of {type(located.text).__name__} only {', '.join(seen)} attend; let the method look at one of "
        f"these (AutoPrune: first_cut='pre_llm', mi_layer={seen[0]}), or take one that ranks before the decoder"
    )


def refuse_positions(method: MethodContract, located: Located) -> None:
    """Compacted positions where patches share one, where they have several dimensions, or differ by layer."""
    if method.positions == "original":
        return
    if getattr(located.base.config, "patches_share_position", False):
        raise UnsupportedError(
            f"all patches of a picture have one position in {type(located.base).__name__}, so a cut leaves no "
            "gap that positions='compacted' could close; use positions='original'"
        )
    rope = getattr(located.text.config, "rope_parameters", None) or {}
    rotary = getattr(located.text, "rotary_emb", None)
    by_layer = rotary is not None and "layer_type" in inspect.signature(rotary.forward).parameters
    if any(map(counts_positions, located.attending)):
        raise UnsupportedError(
            f"{type(located.text).__name__} scales its attention by positions in the prompt "
            "(config.attn_temperature_tuning), which positions='compacted' would not change; use "
            "positions='original'"
        )
    if rotary is None or by_layer or "mrope_section" in rope:
        raise UnsupportedError(
            f"{type(located.text).__name__} has no one-dimensional rotary positions, the same for all layers, "
            "to compact; use positions='original'"
        )


def refuse_sizes(implementation: str) -> NoReturn:
    """Backends whose attention takes nothing that is added to the scores."""
    raise UnsupportedError(
        f"{implementation!r} attention cannot count a token for several, as summaries and sizes of merged "
        "tokens need; use attn_implementation='sdpa', or a method without them"
    )


def refuse_cache(located: Located, cache: Any, length: int) -> None:
    """Caches and backends that cannot follow a sliding window over shortened sequences."""
    layers = getattr(cache, "layers", ())
    if located.is_hybrid and any(map(is_static, layers)):
        raise UnsupportedError(
            f"a static cache of {type(located.text).__name__}, some of whose layers do not attend, cannot be "
            "pruned; use the default cache"
        )
    if located.shares_keys and any(map(is_static, layers)):
        raise UnsupportedError(
            f"a static cache of {type(located.text).__name__}, some of whose layers read the keys of earlier "
            "ones, cannot be pruned; use the default cache"
        )
    if any(is_static(layer) and getattr(layer, "is_sliding", False) for layer in layers):
        raise UnsupportedError(
            "static caches of models with sliding layers cannot be pruned; use the default cache"
        )
    if "flash" in located.implementation and any(map(is_static, layers)):
        raise UnsupportedError(
            "flash attention cannot prune a static cache; use the default cache, or "
            "attn_implementation='sdpa'"
        )
    windows = [window.size for window in located.windows if window is not None]
    if "flash" in located.implementation and windows and min(windows) < length:
        raise UnsupportedError(
            f"flash attention would count its sliding window of {min(windows)} in kept tokens, "
            "not in positions; use attn_implementation='sdpa'"
        )


def refuse_new_images(cache: Any) -> None:
    """Pictures that arrive when the cache already holds tokens."""
    if is_static(cache.layers[0]):
        raise UnsupportedError(
            f"this static cache still holds {int(cache.get_seq_length())} tokens of an earlier prompt; call "
            "its reset() before the next one (a later turn of the same conversation cannot bring new images)"
        )
    raise UnsupportedError(
        "new images on top of a filled cache cannot be pruned (neither a later turn nor a "
        "chunked prefill); run the whole conversation as one prompt"
    )


@torch.compiler.disable
def refuse_compiled_prefill() -> None:
    """A prefill inside torch.compile.

    Kept out of the compiled region: raised inside, it would only make torch.compile step aside.
    """
    raise UnsupportedError(
        "a prefill inside torch.compile cannot be pruned; compile decoding only, on a static cache "
        "(docs/api.md, handle.static_cache)"
    )


@torch.compiler.disable
def refuse_compiled_growth() -> None:
    """Compiled decoding on a pruned cache that grows; see `refuse_compiled_prefill`."""
    raise UnsupportedError(
        "decoding with torch.compile needs a static cache once a prompt is pruned, as the masks of a growing "
        "one are made outside of it; pass handle.static_cache(...) as its cache (docs/api.md)"
    )


def refuse_compiled_parts(located: Located, tower: Sequence[nn.Module]) -> None:
    """A decoder, layers or a tower compiled by themselves, whose hooks and attention go unseen.

    Args:
        tower: the parts of the vision tower that a method must see.
    """
    parts = {
        "decoder": [located.text],
        "decoder layers": [*located.layers, *located.attending],
        "vision tower": [located.vision, *tower] if tower else [],
    }
    for name, modules in parts.items():
        if any(map(_is_compiled, modules)):
            refuse_compiled(name)


def _is_compiled(module: nn.Module) -> bool:
    if module._compiled_call_impl is not None or isinstance(module, OptimizedModule):
        return True
    forward = module.__dict__.get("forward")
    # torch.compiler.disable wraps a function in the same way.
    disabled = getattr(forward, "_torchdynamo_disable", False)
    return hasattr(forward, "_torchdynamo_orig_callable") and not disabled


def refuse_backend(located: Located, attached: str) -> None:
    """An attention backend that was changed while the model is pruned."""
    if located.implementation != attached:
        raise UnsupportedError(
            f"the attention backend was changed from {attached!r} to {located.implementation!r} while the "
            "model is pruned; leave the context (or detach), change it, and enter again"
        )


def refuse_unseen_attention(located: Located) -> None:
    """Attention that is computed past transformers' interface, where the prompts of a batch are told apart."""
    raise UnsupportedError(
        f"{type(located.attending[0]).__name__} does not call transformers' attention interface, so prompts "
        "that keep different numbers of tokens cannot run in one batch; prune one prompt at a time"
    )
