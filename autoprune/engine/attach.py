"""Switch pruning on and off for one model: hooks in, hooks out, nothing left behind."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import StaticCache

from ..contract import MethodContract, ModelShape
from ..errors import UnsupportedError
from ..trace import Sample, Trace
from .cache.static import PrunedStaticCache
from .compiled import Backend, CompiledLayers
from .context import Context
from .hooks import (
    close_all,
    close_context,
    compile_layers,
    keep_layer_hooks,
    open_context,
    served_by,
)
from .locate import locate, warn_if_untested
from .refusals import refuse_hybrid, refuse_mode, refuse_positions, refuse_speed
from .user_inputs import checked_mask, checked_scores, model_of


class Attachment:
    """Pruning of one model by one method; a context manager whose value is the trace.

    `with method(model) as trace:` or `handle = method.attach(model); ...; handle.detach()`.
    The method holds settings only; what belongs to a prompt lives on the forward that runs it (one per
    thread) and on its cache, so threads and interleaved generations do not see each other. Several threads
    may each enter a context of their own on one model; see `Hooks` for which of them serves a thread.
    """

    def __init__(
        self,
        method: MethodContract,
        model: nn.Module,
        visual_mask: torch.Tensor | None = None,
        vision_scores: torch.Tensor | None = None,
        keep: int | None = None,
        on_sample: Callable[[Sample], object] | None = None,
    ):
        model = model_of(model)
        visual_mask, vision_scores = checked_mask(visual_mask), checked_scores(vision_scores)
        self.method, self.model, self.located = method, model, locate(model)
        self.trace = Trace(keep, on_sample)
        self._context = Context(method, model, self.located, visual_mask, vision_scores, self.trace)
        self.vision = self._context.vision
        refuse_positions(method, self.located)
        refuse_hybrid(method, self.located)
        refuse_speed(method, self.located)
        method.check(self.shape)

    @property
    def is_attached(self) -> bool:
        """Whether pruning is switched on."""
        return self._context.is_open

    @property
    def shape(self) -> ModelShape:
        """What a method may know of the model as it is now."""
        return self._context.shape

    def __enter__(self) -> Trace:
        self.attach(for_all=False)
        return self.trace

    def __exit__(self, *exception: object) -> None:
        self.detach()

    def attach(self, for_all: bool = True) -> Attachment:
        """Switch pruning on; see `Method.attach`. After `detach` it may be done again, with the same trace.

        Args:
            for_all: serve every thread that enters no context of its own. If not, as in a `with` block, this
                thread is served, and others as long as no other context is open.

        Raises:
            UnsupportedError: the model is being pruned already, or is in training mode.
        """
        if self.is_attached:
            raise UnsupportedError(
                "this model is being pruned already, by this very handle; it is at work without `with`, until "
                "detach()"
            )
        refuse_mode(self.model)
        warn_if_untested(self.located)
        open_context(self._context, for_all)
        return self

    def detach(self) -> None:
        """Switch pruning off. With the last context of a model all hooks are gone: it is as it was.

        Harmless when nothing is attached.
        """
        if self.is_attached:
            close_context(self._context)
        self.trace.flush()

    def __repr__(self) -> str:
        state = "attached" if self.is_attached else "not attached"
        return f"<{self.method!r} on {type(self.model).__name__}, {state}>"

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise UnsupportedError(
            "a handle cannot be copied or pickled, as it belongs to the hooks of its model; copy the model, "
            "the method or handle.trace, and attach the method to the copy"
        )

    def encode(self, **inputs: Any) -> dict[str, Any]:
        """The features of pictures and videos, to be asked about many times.

        Pass the result as `mm_encoder_outputs=` instead of the pixel values, to `model.generate` or to
        the model, in this context or in one whose method sees no more of the vision tower.

        Args:
            inputs: `pixel_values` and what belongs to it, as the processor gave it.

        Raises:
            UnsupportedError: the model takes no features in this release of transformers, or pruning is
                not switched on.
            ValueError: there is neither a picture nor a video among the inputs.
        """
        if "mm_encoder_outputs" not in inspect.signature(self.located.outer.forward).parameters:
            raise UnsupportedError(
                f"{type(self.located.outer).__name__} takes no features in place of pictures in this "
                "release of transformers; pass the pixel values each time"
            )
        if not self.is_attached:
            raise UnsupportedError(
                "pruning is not switched on; call encode between attach and detach"
            )
        with served_by(self._context):
            return self._context.vision.encode(inputs)

    def compile_prefill(self, backend: Backend = "inductor") -> Attachment:
        """Run the decoder layers of pruned prefills under torch.compile: fewer kernels are launched.

        One graph serves all lengths and all layers of a kind; the first prompt waits for it. It stays with
        this handle, also when it is detached and attached again.

        Args:
            backend: of `torch.compile`, by name or a function.

        Returns:
            This handle.

        Raises:
            UnsupportedError: attention other than sdpa, layers that are compiled or wrapped already, or no
                compiler that works here. Raised by a prefill: a cache that is not the default one, or
                layers that are not one graph.
            ValueError: there is no such backend.
        """
        compile_layers(self._context, CompiledLayers(self.located, backend))
        return self

    def static_cache(
        self, num_visual: int | Sequence[int], num_text: int, max_new_tokens: int
    ) -> StaticCache:
        """A static cache with only as much room in every layer as a pruned prompt can need there.

        Pass it as the cache (`past_key_values`, or `cache` from transformers 5.24 on) to `model.generate` or
        to the model, to decode with torch.compile. After `cache.reset()` it takes the next prompt, and the
        same compiled graph serves all of them.

        Args:
            num_visual: visual tokens of a prompt; several numbers if prompts differ, in a batch or from
                one to the next.
            num_text: at most so many other tokens in a prompt. A batch that is padded beyond its longest
                prompt needs room for that padding, too.
            max_new_tokens: as for `model.generate`.

        Raises:
            UnsupportedError: the model has sliding layers, or attention other than sdpa and eager.
            ValueError: a number is out of range, or the budget infeasible for such prompts.
        """
        cache = PrunedStaticCache(
            self.located, self.method, self.shape, num_visual, num_text, max_new_tokens
        )
        keep_layer_hooks(self._context)
        return cache


def detach(model: Any) -> None:
    """Switch off all pruning of `model`, by whichever handles and contexts: it is as it was.

    For a handle that was lost. Harmless when nothing is attached.

    Raises:
        ValueError: this is no model.
    """
    is_handle = isinstance(model, Attachment)
    inner = model_of(model)
    if is_handle or not isinstance(inner, nn.Module):
        way_out = "call its own detach()" if is_handle else "pass the model"
        raise ValueError(
            f"detach takes the model that is pruned, got {type(model).__name__}; {way_out}"
        )
    close_all(inner)
