"""Come between a model and its attention: shadow transformers' functions under their own names.

The shadow hands the attention of tagged modules to whoever tagged them, together with the original
function. A module that nobody tagged runs the original directly. The shadow is gone when the last tag is.
"""

from __future__ import annotations

import inspect
import sys
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

# Called as handler(attend, module, query, key, value, attention_mask, *args, **kwargs), where `attend`
# is the original function of (module, query, ...), whose result it returns.
Handler = Callable[..., Any]


class Traced:
    """Where the attention of a layer that torch.compile traces is noted; see `engine/compiled.py`.

    calls: (query, key, attention mask, scaling, softcap) of each call. None where nobody asks, and while
        nothing is traced: what is set in a trace exists there only, so threads do not meet.
    """

    calls: list[tuple[Any, ...]] | None = None


traced = Traced()

_lock = threading.Lock()
_handlers: dict[nn.Module, Handler] = {}
_tags: dict[nn.Module, int] = {}
_users: dict[str, int] = {}
_covered: dict[str, Any] = {}


def tag(modules: dict[nn.Module, Handler], implementations: set[str]) -> None:
    """Let each module's handler compute its attention; a module that is tagged again has the same one."""
    with _lock:
        for name in implementations:
            if not _users.get(name):
                local = ALL_ATTENTION_FUNCTIONS._local_mapping
                _covered[name] = local.get(name)
                ALL_ATTENTION_FUNCTIONS[name] = _shadow(name, ALL_ATTENTION_FUNCTIONS.get(name))
            _users[name] = _users.get(name, 0) + 1
        for module in modules:
            _tags[module] = _tags.get(module, 0) + 1
        _handlers.update(modules)


def untag(modules: dict[nn.Module, Handler], implementations: set[str]) -> None:
    """Undo `tag`; the last one to leave restores the attention functions."""
    with _lock:
        for module in modules:
            _tags[module] -= 1
            if not _tags[module]:
                del _tags[module], _handlers[module]
        for name in implementations:
            _users[name] -= 1
            if not _users[name]:
                del ALL_ATTENTION_FUNCTIONS[name]
                if (previous := _covered.pop(name)) is not None:
                    ALL_ATTENTION_FUNCTIONS[name] = previous


def _shadow(name: str, original: Callable | None) -> Callable:
    def attention(
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: Any = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        attend = original or _eager(module)
        if torch.compiler.is_dynamo_compiling():
            if traced.calls is not None:
                limits = kwargs.get("scaling"), kwargs.get("softcap")
                traced.calls.append((query, key, attention_mask, *limits))
            return attend(module, query, key, value, attention_mask, *args, **kwargs)
        if (handler := _handlers.get(module)) is None:
            return attend(module, query, key, value, attention_mask, *args, **kwargs)
        return handler(attend, module, query, key, value, attention_mask, *args, **kwargs)

    attention.__name__ = name
    return attention


def _eager(module: nn.Module) -> Callable:
    """transformers does not register "eager": each modelling file has its own, which the attention names."""
    default = "eager_attention_forward"
    for cls in type(module).__mro__:
        code = getattr(inspect.unwrap(getattr(cls, "forward", _eager)), "__code__", None)
        named = [name for name in getattr(code, "co_names", ()) if name.endswith(default)]
        for name in (*named, default):
            function = getattr(sys.modules.get(cls.__module__), name, None)
            if function is not None:
                return function
    raise RuntimeError(f"no {default} beside {type(module).__name__}")


class NoPlans:
    """Within this, torch's attention does without cuDNN; a context manager for all threads.

    The setting is the process's: a thread that changes it meanwhile, as `torch.nn.attention.sdpa_kernel`
    does, may end up with the other's.

    cuDNN plans its attention for every shape it has not met, which takes tens of milliseconds. A model
    that is not pruned meets one new shape with each token it generates; layers that were cut have lengths of
    their own, each of them a shape, and every prompt has others.
    """

    def __init__(self) -> None:
        self._lock, self._inside, self._before = threading.Lock(), 0, True

    def __enter__(self) -> None:
        with self._lock:
            if not self._inside:
                self._before = torch.backends.cuda.cudnn_sdp_enabled()
                torch.backends.cuda.enable_cudnn_sdp(False)
            self._inside += 1

    def __exit__(self, *exception: object) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                torch.backends.cuda.enable_cudnn_sdp(self._before)


no_plans = NoPlans()
