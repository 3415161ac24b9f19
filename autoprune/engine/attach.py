"""Switch pruning on and off for one model: hooks in, hooks out, nothing left behind."""

from __future__ import annotations

import inspect
import threading
import weakref
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.cache_utils import StaticCache

from ..errors import UnsupportedError
from ..method import ModelShape, Prompts, PromptState
from ..trace import Prefilled, Trace
from . import tap
from .cache import Decode, PrunedCache, is_static, narrowed, static_step
from .layout import Layout, on_host, read_layout
from .locate import locate, warn_if_untested
from .prefill import Prefill
from .refusals import (
    refuse_cache,
    refuse_compiled_prefill,
    refuse_mode,
    refuse_new_images,
    refuse_positions,
    unwatch_generate,
    watch_generate,
)
from .static_cache import PrunedStaticCache
from .vision import VisionTap
from .vision_merging import has_pixels, unwatch_encoding, watch_encoding
from .vision_view import VisionView

if TYPE_CHECKING:
    from ..method import Method

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
        self.method, self.model = method, model
        self.located = locate(model)
        wanted = method.tower()
        if vision_scores is not None:
            wanted = replace(wanted, attention=False, merge=False)
        self.vision = VisionTap(self.located.base, self.located.vision, wanted, method.merge)
        self.visual_mask = None if visual_mask is None else torch.atleast_2d(visual_mask)
        self.vision_scores = vision_scores
        self.trace = Trace()
        self.shape = ModelShape(
            num_layers=len(self.located.layers),
            cost=self.located.cost,
            has_vision_scores=self.vision.available or vision_scores is not None,
        )
        refuse_positions(method, self.located)
        method.check(self.shape)
        self._handles: list[Any] = []
        self._local = threading.local()

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
                    located.outer.register_forward_pre_hook(self._before_model, **hook)
                )
            self._handles.append(located.base.register_forward_pre_hook(self._before_base, **hook))
            self._handles.append(located.text.register_forward_pre_hook(self._before_text, **hook))
            self._handles.append(located.text.register_forward_hook(self._after_text))
            for index, layer in enumerate(located.layers):
                self._handles.append(
                    layer.register_forward_pre_hook(self._layer_hook(index), **hook)
                )
            self.vision.install()
            watch_generate(self.located.outer)
            if self.vision.merging.blocks:
                watch_encoding(located.outer, self._read_and_expect, self.vision.merging.forget)
            self._tagged = dict.fromkeys(located.attentions, self._attend)
            self._implementations = {located.implementation}
            for attention in self.vision.tapped:
                self._tagged[attention] = self.vision.attend
                self._implementations.add(attention.config._attn_implementation)
            tap.tag(self._tagged, self._implementations)
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
        unwatch_generate(self.located.outer)
        unwatch_encoding(self.located.outer)
        if hasattr(self, "_tagged"):
            tap.untag(self._tagged, self._implementations)
            del self._tagged
        _attached.discard(self.located.text)
        self._local = threading.local()

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

        Pass it as `past_key_values` to `model.generate` or to the model, to decode with torch.compile.
        After `cache.reset()` it takes the next prompt, and the same compiled graph serves all of them.

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

    def _before_model(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        """Assisted decoding sends draft tokens along with the prompt; it asks for their logits."""
        if torch.compiler.is_compiling():
            return
        asked = kwargs.get("logits_to_keep")
        with_cache = kwargs.get("past_key_values") is not None
        self._local.drafts = asked - 1 if with_cache and isinstance(asked, int) and asked > 1 else 0

    def _before_base(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        ids = kwargs.get("input_ids", args[0] if args else None)
        if torch.compiler.is_compiling():
            new = ids if ids is not None else kwargs["inputs_embeds"]
            if new.shape[1] > 1:
                refuse_compiled_prefill()
            return
        self.vision.recall(kwargs.get("mm_encoder_outputs"))
        mask = kwargs.get("attention_mask")
        # A prompt is read before the vision tower is queued, so that a GPU need not be waited for.
        later = PrunedCache.of(kwargs.get("past_key_values")) is not None
        is_prompt = ids is not None and ids.shape[1] > 1 and not later
        host = on_host(ids, mask) if is_prompt else (ids, mask)
        self.vision.merging.forget()
        if is_prompt and has_pixels(kwargs):
            self._expect(*host, getattr(self._local, "drafts", 0))
        self._local.prompt = {
            "host": host,
            "attention_mask": mask,
            "has_images": has_pixels(kwargs) or bool(kwargs.get("mm_encoder_outputs")),
        }

    def _read_and_expect(self, ids: torch.Tensor, mask: Any) -> None:
        self._expect(*on_host(ids, mask))

    def _expect(self, ids: torch.Tensor, mask: Any, drafts: int = 0) -> None:
        """Tell a tower that merges, before it runs, what the prompts keep of their visual tokens."""
        if not self.vision.merging.blocks:
            return
        layout = read_layout(
            ids, mask, ids.shape, self.located.visual_ids, self.visual_mask, drafts
        )
        prompts = set(zip(layout.num_visual, layout.num_text, strict=True))
        depth, cost = self.shape.num_layers, self.shape.cost
        self.vision.merging.expect(
            [(self.method.capacity(depth, *p, cost=cost)[0], p[0]) for p in prompts if p[0]]
        )

    def _before_text(
        self, module: nn.Module, args: tuple, kwargs: dict
    ) -> tuple[tuple, dict] | None:
        if torch.compiler.is_compiling():
            return None
        local = self._local
        local.run = None
        prompt, local.prompt = getattr(local, "prompt", None), None
        refuse_mode(self.model, kwargs)
        embeds = kwargs.get("inputs_embeds")
        if prompt is None or embeds is None:
            return None
        cache = kwargs.get("past_key_values")
        valid = prompt["attention_mask"]
        valid = valid if isinstance(valid, torch.Tensor) and valid.ndim == 2 else None
        if (
            cache is not None
            and (pruned := PrunedCache.of(cache)) is not None
            and self._length(cache)
        ):
            refuse_new_images(prompt)
            local.run = Decode(self, pruned, cache, embeds.shape[1], valid)
        elif cache is None or not self._length(cache):
            PrunedCache.forget(cache)
            deepstack = kwargs.get("deepstack_visual_embeds") or ()
            local.run = self._prefill(prompt, embeds, cache, deepstack)
            if local.run is not None and deepstack:
                # The model would add these at full length; the layers' hooks add what is left of them.
                return args, {**kwargs, "deepstack_visual_embeds": None, "visual_pos_masks": None}
        elif embeds.shape[1] > 1:
            refuse_new_images(prompt)
        return None

    def _prefill(
        self, prompt: dict, embeds: torch.Tensor, cache: Any, deepstack: Sequence[torch.Tensor]
    ) -> Prefill | None:
        drafts, self._local.drafts = getattr(self._local, "drafts", 0), 0
        ids, mask = prompt["host"]
        layout = read_layout(
            ids, mask, embeds.shape, self.located.visual_ids, self.visual_mask, drafts
        )
        vision = self._vision_scores(prompt, layout)
        if isinstance(cache, PrunedStaticCache):
            cache.admit(self.method, layout)
        prompts = Prompts(layout.num_visual, layout.num_text)
        state = PromptState(self.shape, prompts)
        if not any(prompts.num_visual):
            state.schedule = [[0] * self.shape.num_layers for _ in prompts.num_visual]
            self.trace.record(Prefilled(layout, state))
            return None
        refuse_cache(self.located, cache, embeds.shape[1])
        return Prefill(self, layout, state, embeds.device, cache, vision, deepstack)

    def _layer_hook(self, index: int):
        def before_layer(module: nn.Module, args: tuple, kwargs: dict):
            if torch.compiler.is_compiling():
                return self._compiled_step(index, args, kwargs)
            run = getattr(self._local, "run", None)
            if run is not None:
                args, kwargs = run.before_layer(index, args, kwargs)
            layers = getattr(kwargs.get("past_key_values"), "layers", ())
            return args, narrowed(layers[index], kwargs) if index < len(layers) else kwargs

        return before_layer

    def _compiled_step(self, index: int, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        """Decoding inside torch.compile: tensors only, so one graph serves every kept set."""
        layers = getattr(kwargs.get("past_key_values"), "layers", ())
        if index >= len(layers) or not is_static(layers[index]):
            return None
        return args, static_step(self.located, layers[index], args[0], kwargs)

    def _attend(self, attend, module, query, key, value, attention_mask, *args, **kwargs):
        run = getattr(self._local, "run", None)
        if isinstance(run, Prefill):
            return run.attend(attend, module, query, key, value, attention_mask, *args, **kwargs)
        return attend(module, query, key, value, attention_mask, *args, **kwargs)

    def _after_text(self, module: nn.Module, args: tuple, output: Any) -> Any:
        if torch.compiler.is_compiling():
            return None
        run, self._local.run = getattr(self._local, "run", None), None
        if not isinstance(run, Prefill):
            return None
        output = run.finish(output)
        self.trace.record(run.record())
        return output

    def _vision_scores(self, prompt: dict, layout: Layout) -> VisionView | None:
        collected = self.vision.take(prompt["host"][0], layout.visual)
        if self.vision_scores is None:
            return collected
        scores = torch.as_tensor(self.vision_scores, dtype=torch.float32).flatten()
        total = sum(layout.num_visual)
        if not scores.numel() or total % scores.numel():
            raise ValueError(
                f"vision_scores has {scores.numel()} entries but the prompts hold {total} visual tokens; "
                "pass one score per visual token, prompt by prompt"
            )
        others = {} if collected is None else collected.values
        return VisionView({**others, "vision_scores": scores})

    @staticmethod
    def _length(cache: Any) -> bool:
        length = cache.get_seq_length()
        return bool(length > 0) if isinstance(length, torch.Tensor) else length > 0
