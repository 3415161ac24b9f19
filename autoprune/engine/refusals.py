"""What cannot be right is refused before it runs, with the cause and the way out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..errors import UnsupportedError
from .cache import is_static
from .static_cache import PrunedStaticCache

if TYPE_CHECKING:
    from ..method import Method
    from .locate import Located


def refuse_mode(model: nn.Module, arguments: dict[str, Any] | None = None) -> None:
    """Training mode, and continuous batching (its attention arguments hold a paged `cache`)."""
    if model.training:
        raise UnsupportedError("the model is in training mode; call model.eval() to prune it")
    if arguments is not None and "cache" in arguments:
        raise UnsupportedError(
            "continuous batching cannot be combined with pruning; use model.generate"
        )


def refuse_positions(method: Method, located: Located) -> None:
    """Compacted positions where rotary positions have more than one dimension."""
    if method.positions == "original":
        return
    rope = getattr(located.text.config, "rope_parameters", None) or {}
    if not hasattr(located.text, "rotary_emb") or "mrope_section" in rope:
        raise UnsupportedError(
            f"{type(located.text).__name__} has no one-dimensional rotary positions to compact; "
            "use positions='original'"
        )


def refuse_cache(located: Located, cache: Any, length: int) -> None:
    """Caches and backends that cannot follow a sliding window over shortened sequences."""
    layers = getattr(cache, "layers", ())
    if any(is_static(layer) and getattr(layer, "is_sliding", False) for layer in layers):
        raise UnsupportedError(
            "static caches of models with sliding layers cannot be pruned; use the default cache"
        )
    if "flash" in located.implementation and any(map(is_static, layers)):
        raise UnsupportedError(
            "flash attention cannot prune a static cache; use the default cache, or "
            "attn_implementation='sdpa'"
        )
    windows = {window for window in located.windows if window is not None}
    if "flash" in located.implementation and windows and min(windows) < length:
        raise UnsupportedError(
            f"flash attention would count its sliding window of {min(windows)} in kept tokens, "
            "not in positions; use attn_implementation='sdpa'"
        )


def refuse_new_images(prompt: dict[str, Any]) -> None:
    """Pictures that arrive when the cache already holds tokens."""
    if prompt["has_images"]:
        raise UnsupportedError(
            "new images on top of a filled cache cannot be pruned (neither a later turn nor a "
            "chunked prefill); run the whole conversation as one prompt"
        )


@torch.compiler.disable
def refuse_compiled_prefill() -> None:
    """A prefill inside torch.compile.

    Kept out of the compiled region: raised inside, it would only make torch.compile step aside.
    """
    raise UnsupportedError("a prefill inside torch.compile cannot be pruned; compile decoding only")


def refuse_length(cache: Any, prompt: int, total: int) -> None:
    """More new tokens than an empty `PrunedStaticCache` has room for."""
    if not isinstance(cache, PrunedStaticCache):
        return
    new = total - prompt
    if new > cache.max_new_tokens and not cache.get_seq_length():
        raise ValueError(
            f"this static cache was made for max_new_tokens={cache.max_new_tokens}, and {new} are "
            "to be generated; make one with more"
        )


def watch_generate(model: nn.Module) -> None:
    """Make `model.generate` refuse what its forwards do not show.

    That is a prefill in chunks, whose first forward looks like any other, and more new tokens than a
    static cache was made for.
    """
    prefill = getattr(model, "_prefill", None)
    if prefill is None:
        return

    def watched(input_ids, generation_config, model_kwargs, *args, **kwargs):
        if getattr(generation_config, "prefill_chunk_size", None) is not None:
            raise UnsupportedError(
                "a prefill in chunks cannot be pruned, since a chunk does not see the whole "
                "question; leave prefill_chunk_size at None"
            )
        cache = model_kwargs.get("past_key_values")
        refuse_length(cache, input_ids.shape[1], generation_config.max_length)
        return prefill(input_ids, generation_config, model_kwargs, *args, **kwargs)

    model._prefill = watched


def unwatch_generate(model: nn.Module) -> None:
    """Undo `watch_generate`."""
    model.__dict__.pop("_prefill", None)
