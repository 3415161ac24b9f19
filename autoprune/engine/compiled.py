"""Run the decoder layers of a prefill compiled, with the engine's cuts between them."""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
from torch import nn
from torch._dynamo.exc import FailOnRecompileLimitHit, InvalidBackend, TorchDynamoException
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer
from transformers.utils import output_capturing

from ..errors import UnsupportedError
from .attention.tap import no_plans, traced
from .attention.temperature import counts_positions
from .cache.argument import NAMES, cache_of, without_cache
from .locate import SHARED_KEYS, Located, names_of
from .prefill import Prefill
from .refusals import refuse_compiled_parts

# Transformers' record of hidden states and the like, which its hooks on parts of the layers write.
_recorder: Any = getattr(output_capturing, "_active_collector", None)

Backend = str | Callable[..., Any]


class CompiledLayers:
    """The decoder layers of one model under torch.compile: one graph for layers of a kind, at all lengths.

    A compiled layer returns its output, its keys and values, and what its attention was given. The cache is
    filled and the attention observed behind it. Hooks run outside of it.

    Args:
        backend: of `torch.compile`.

    Raises:
        UnsupportedError: the layers are compiled already, their attention is not sdpa, or the compiler does
            not work here.
        ValueError: there is no such backend.
    """

    def __init__(self, located: Located, backend: Backend):
        refuse_compiled_parts(located, ())
        if located.implementation != "sdpa":
            raise UnsupportedError(
                f"compile_prefill needs attn_implementation='sdpa', and this model has "
                f"{located.implementation!r}; load it with sdpa, or prune it without compile_prefill()"
            )
        if any(SHARED_KEYS in names_of(layer) for layer in located.layers):
            raise UnsupportedError(
                f"the layers of {type(located.text).__name__} hand keys and values to each other beside the "
                "cache, which compiled layers do not; prune it without compile_prefill()"
            )
        if any(map(counts_positions, located.attending)):
            raise UnsupportedError(
                f"the attention of {type(located.text).__name__} counts positions, which a cut changes and a "
                "compiled layer does not see; prune it without compile_prefill()"
            )
        _try(backend, next(located.text.parameters()).device)
        self.backend = backend
        self._compiled: dict[Any, Callable[..., Any]] = {}

    def run(
        self, prefill: Prefill, index: int, forward: Callable[..., Any], args: tuple, kwargs: dict
    ) -> Any:
        """What decoder layer `index` of a prefill returns.

        Left to `forward`: packed rows, a single token, a layer that is only run to be seen or of whose parts
        transformers records something, and everything that a dispatch mode of torch watches.

        Args:
            forward: the layer's own.

        Raises:
            UnsupportedError: the cache is not the default one, or the layer is not one graph.
        """
        as_it_is = prefill.packing is not None or prefill.observer.peeking or args[0].shape[1] < 2
        if as_it_is or _records_parts() or _is_watched():
            return forward(*args, **kwargs)
        cache = cache_of(kwargs)
        _refuse_cache(cache)
        output, (keys, values), attended = self._run(prefill.located.layers[index], args, kwargs)
        if cache is not None and keys is not None:
            _fill(cache, index, keys, values)
        for query, key, mask, scaling, softcap in attended:
            prefill.observer.see(prefill.tokens, query, key, mask, scaling, softcap)
        return output

    def _run(self, layer: nn.Module, args: tuple, kwargs: dict) -> Any:
        name = next((name for name in NAMES if name in kwargs), None)
        kwargs = without_cache(kwargs)
        absent = tuple(argument for argument, value in kwargs.items() if value is None)
        # Cases that are graphs of their own anyway: torch makes only a few graphs of one function.
        case = type(layer), len(args[0]) == 1, torch.is_grad_enabled(), absent
        if case not in self._compiled:
            self._compiled[case] = _compile(_run_layer, self.backend)
        try:
            # The kernel of the attention is chosen when the layer is traced.
            with no_plans:
                return self._compiled[case](layer, name, args, kwargs)
        except (TorchDynamoException, FailOnRecompileLimitHit) as error:
            raise UnsupportedError(
                f"torch.compile does not make one graph of {type(layer).__name__} ({_sentence(error)}); prune "
                "without compile_prefill()"
            ) from error


def refuse_wrapped(layer: nn.Module, forward: Callable[..., Any]) -> None:
    """Raise UnsupportedError if `forward` of a layer is not that of its class, which is what is compiled."""
    if getattr(forward, "__func__", None) is not type(layer).forward:
        raise UnsupportedError(
            f"the forward of {type(layer).__name__} was wrapped by something else (a device_map over several "
            "devices does so), and would be left out when it is compiled; load the model on one device, or "
            "prune it without compile_prefill()"
        )


class _Taken:
    """Stands in for the cache while a layer is traced: takes its keys and values, and hands them back."""

    def __init__(self) -> None:
        self.keys: torch.Tensor | None = None
        self.values: torch.Tensor | None = None

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self.keys, self.values = keys, values
        return keys, values


def _run_layer(layer: nn.Module, cache_name: str | None, args: tuple, kwargs: dict) -> Any:
    """The function that is compiled. What it returns beside the output are tensors that it makes anyway."""
    taken = _Taken()
    attended: list[tuple[Any, ...]] = []
    caches = {} if cache_name is None else {cache_name: taken}
    # Where torch is told not to compile, the attention is seen as it runs.
    tracing = torch.compiler.is_dynamo_compiling()
    if tracing:
        traced.calls = attended
        if _recorder is not None:
            _recorder.compiling = True  # for the trace: its hooks cannot be traced otherwise
    output = type(layer).forward(layer, *args, **caches, **kwargs)
    if tracing:
        traced.calls = None
        if _recorder is not None:
            _recorder.compiling = False
    return output, (taken.keys, taken.values), attended


def _compile(function: Callable[..., Any], backend: Backend) -> Callable[..., Any]:
    # torch keeps graphs, and counts them, by code object; each model is to have its own.
    own = FunctionType(function.__code__.replace(), function.__globals__, function.__name__)
    return torch.compile(own, backend=backend, dynamic=True, fullgraph=True)


def _probe(number: torch.Tensor) -> tuple[torch.Tensor, bool]:
    return number + 1, torch.compiler.is_dynamo_compiling()


def _try(backend: Backend, device: torch.device) -> None:
    """Compile one addition, so that what is missing is said now and not at the first prompt."""
    try:
        _, compiled = _compile(_probe, backend)(torch.zeros(2, device=device))
    except InvalidBackend as error:
        raise ValueError(
            f"backend must be one of torch.compiler.list_backends(), or a function, got {backend!r}"
        ) from error
    except Exception as error:
        raise UnsupportedError(
            f"torch.compile does not work here with backend {backend!r} ({_sentence(error)}); install the "
            "compiler it needs (a C++ compiler on a CPU, Triton on a GPU), or prune without compile_prefill()"
        ) from error
    if not compiled:
        raise UnsupportedError(
            "torch.compile is switched off here (TORCHDYNAMO_DISABLE, or a dispatch mode is active); switch "
            "it on, or prune without compile_prefill()"
        )


def _records_parts() -> bool:
    recorded = None if _recorder is None else _recorder.get()
    return any(name != "hidden_states" and name[0] != "_" for name in recorded or ())


def _is_watched() -> bool:
    """Whether a dispatch mode is active, as to count FLOPs, under which torch compiles nothing.

    A function that it declined to compile there once would not be compiled afterwards either.
    """
    modes = _get_current_dispatch_mode_stack()
    return not all(getattr(mode, "ignore_compile_internals", bool)() for mode in modes)


def _refuse_cache(cache: Any) -> None:
    plain = DynamicLayer, DynamicSlidingWindowLayer
    if cache is None or (
        type(cache) is DynamicCache
        and not getattr(cache, "offloading", False)
        and all(type(layer) in plain for layer in cache.layers)
    ):
        return
    raise UnsupportedError(
        f"a compiled prefill fills the default cache, not {type(cache).__name__}; leave the cache to the "
        "model, or prune without compile_prefill()"
    )


def _fill(cache: DynamicCache, index: int, keys: torch.Tensor, values: torch.Tensor) -> None:
    """Put a layer's keys and values into its empty cache."""
    layer = cache.layers[index] if index < len(cache.layers) else None
    whole = all(t.untyped_storage().nbytes() == t.nbytes for t in (keys, values))
    if type(layer) is DynamicLayer and not layer.is_initialized and whole:
        # The cache's own update would copy both.
        layer.lazy_initialization(keys, values)
        layer.keys, layer.values = keys, values
    else:
        cache.update(keys, values, index)


def _sentence(error: BaseException) -> str:
    """The first line that says what went wrong."""
    cause = getattr(error, "inner_exception", error)  # what the backend raised
    lines = (line.strip() for line in str(cause).splitlines())
    return next((line for line in lines if line), type(error).__name__).rstrip(".:")
