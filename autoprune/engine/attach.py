"""Switch pruning on and off for one model: hooks in, hooks out, nothing left behind."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.cache_utils import StaticCache

from ..errors import UnsupportedError
from ..trace import Trace
from . import tap
from .cover import Cover
from .forwards import Forwards
from .generation import WATCHED
from .locate import locate, warn_if_untested
from .refusals import refuse_mode, refuse_positions
from .static_cache import PrunedStaticCache
from .vision_merging import watch_encoding

if TYPE_CHECKING:
    from ..method import Method, ModelShape

_attached: weakref.WeakSet[nn.Module] = weakref.WeakSet()


class Attachment:
    """Pruning of one model by one method; a context manager whose value is the trace.

    `with method(model) as trace:` or `handle = method.attach(model); ...; handle.detach()`.
    The method holds settings only; what belongs to a prompt lives on the forward that runs it (one per
    thread) and on its cache, so threads and interleaved generations do not see each other.
    """

    def __init__(
        self,
        method: Method,
        model: nn.Module,
        visual_mask: torch.Tensor | None = None,
        vision_scores: torch.Tensor | None = None,
    ):
        _check_scores(vision_scores)
        self.method, self.model, self.located = method, model, locate(model)
        self.forwards = Forwards(method, model, self.located, visual_mask, vision_scores)
        self.vision, self.trace = self.forwards.vision, self.forwards.trace
        refuse_positions(method, self.located)
        method.check(self.shape)
        self._handles: list[Any] = []

    @property
    def shape(self) -> ModelShape:
        """What a method may know of the model as it is now."""
        return self.forwards.shape

    def __enter__(self) -> Trace:
        self.attach()
        return self.trace

    def __exit__(self, *exception: object) -> None:
        self.detach()

    def attach(self) -> Attachment:
        """Install the hooks; see `Method.attach`.

        Raises:
            UnsupportedError: the model is being pruned already, or is in training mode.
        """
        if self._handles or self.located.text in _attached:
            raise UnsupportedError(
                "this model is being pruned already; leave the first context (or detach its handle) "
                "before entering another one"
            )
        refuse_mode(self.model)
        located = self.located
        warn_if_untested(located)
        hook = {"with_kwargs": True}
        try:
            _attached.add(located.text)
            if located.outer is not located.base:
                self._handles.append(
                    located.outer.register_forward_pre_hook(self.forwards.before_model, **hook)
                )
            self._handles.append(
                located.base.register_forward_pre_hook(self.forwards.before_base, **hook)
            )
            self._handles.append(
                located.text.register_forward_pre_hook(self.forwards.before_text, **hook)
            )
            self._handles.append(located.text.register_forward_hook(self.forwards.after_text))
            for index, layer in enumerate(located.layers):
                self._handles.append(
                    layer.register_forward_pre_hook(self.forwards.layer_hook(index), **hook)
                )
            self.vision.install()
            watched = WATCHED
            if (merging := self.vision.merging).blocks:
                watched = watched | watch_encoding(self.forwards.read_and_expect, merging.forget)
            self._handles.append(Cover(located.outer, watched))
            tagged = dict.fromkeys(located.attentions, self.forwards.attend)
            tagged |= dict.fromkeys(self.vision.tapped, self.vision.attend)
            names = {module.config._attn_implementation for module in self.vision.tapped}
            names.add(located.implementation)
            self.forwards.implementation = located.implementation
            tap.tag(tagged, names)
            self._tagged, self._implementations = tagged, names
        except BaseException:
            self.detach()
            _attached.discard(located.text)
            raise
        return self

    def detach(self) -> None:
        """Remove every hook; the model is as it was. Harmless when nothing is attached."""
        if not self._handles:
            return
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self.vision.remove()
        if hasattr(self, "_tagged"):
            tap.untag(self._tagged, self._implementations)
            del self._tagged
        _attached.discard(self.located.text)
        self.forwards.forget()

    def encode(self, **inputs: Any) -> dict[str, Any]:
        """The features of pictures and videos, to be asked about many times.

        Pass the result as `mm_encoder_outputs=` instead of the pixel values, to `model.generate` or to
        the model, in this context or in one whose method sees no more of the vision tower.

        Args:
            inputs: `pixel_values` and what belongs to it, as the processor gave it.

        Raises:
            UnsupportedError: the model takes no features in this release of transformers, or pruning is
                not switched on.
        """
        if "mm_encoder_outputs" not in inspect.signature(self.located.outer.forward).parameters:
            raise UnsupportedError(
                f"{type(self.located.outer).__name__} takes no features in place of pictures in this "
                "release of transformers; pass the pixel values each time"
            )
        if not self._handles:
            raise UnsupportedError(
                "pruning is not switched on; call encode between attach and detach"
            )
        return self.vision.encode(inputs)

    def static_cache(
        self, num_visual: int | Sequence[int], num_text: int, max_new_tokens: int
    ) -> StaticCache:
        """A static cache with only as much room in every layer as a pruned prompt can need there.

        Pass it as the cache (`past_key_values`, or `cache` from transformers 5.24 on) to `model.generate` or
        to the model, to decode with torch.compile. After `cache.reset()` it takes the next prompt, and the same compiled graph serves all of them.

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
        return PrunedStaticCache(
            self.located, self.method, self.shape, num_visual, num_text, max_new_tokens
        )


def _check_scores(scores: Any) -> None:
    """Raise ValueError for scores that are no shares of anything; NaN is a token without one."""
    if scores is None:
        return
    scores = torch.as_tensor(scores, dtype=torch.float32)
    if bool((scores < 0).any() | scores.isinf().any() | scores.isnan().all()):
        raise ValueError(
            "vision_scores must be finite and 0 or more, as attention is (NaN for a token without a score); "
            "turn logits into shares first, as with softmax"
        )
