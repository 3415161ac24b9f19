"""One method at work on a model: what it does with each forward that it serves."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from ..contract import MethodContract, ModelShape, Prompts, PromptState
from ..trace import Trace
from .cache.argument import cache_of
from .cache.pruned import PrunedCache, refuse_lost_memory
from .cache.static import PrunedStaticCache, is_static
from .compiled import CompiledLayers
from .decode import Decode
from .generate import drafts_follow
from .locate import Located
from .prefill import Prefill
from .record import Record
from .refusals import (
    refuse_backend,
    refuse_cache,
    refuse_compiled_parts,
    refuse_mode,
    refuse_new_images,
)
from .speed import device_speed
from .tokens.layout import Layout, on_host, read_layout
from .tokens.pictures import picture_sizes
from .tokens.placeholders import visual_ids
from .vision.observer import TowerObserver, TowerState, has_pixels
from .vision.view import VisionView


@dataclass
class Inputs:
    """What the model was called with, as read before anything was queued on a GPU.

    ids, mask: `input_ids` and `attention_mask`, on the host where they are a prompt's; given_mask: as given.
    visual_ids: the ids of visual tokens.
    has_images: whether pictures came along, or features of some.
    drafts: how many proposed tokens stand behind the prompt.
    filled: whether the cache holds tokens.
    """

    ids: torch.Tensor | None
    mask: Any
    given_mask: Any
    visual_ids: tuple[int, ...]
    has_images: bool
    drafts: int
    filled: bool


@dataclass
class Forward:
    """What belongs to the forward of one thread in one context, from hook to hook.

    drafts: as in `Inputs`, until they are read.
    inputs: until the decoder begins.
    run: what is done to the decoder.
    tower: what was seen of the vision tower; in `generate` it waits for its forward.
    """

    drafts: int = 0
    inputs: Inputs | None = None
    run: Prefill | Decode | None = None
    tower: TowerState = field(default_factory=TowerState)


class ThreadState(threading.local):
    """What belongs to one thread: the only such state of the engine.

    bound: the context that its `generate` began with; copies: how many that makes of each prompt.
    serving: whose forward is under way; watching: whose method sees the vision tower at work.
    forwards: one for each context that has served this thread.
    """

    def __init__(self) -> None:
        self.bound: Context | None = None
        self.copies = 1
        self.serving: Context | None = None
        self.watching: Context | None = None
        self.forwards: WeakKeyDictionary[Context, Forward] = WeakKeyDictionary()


class Context:
    """One method at work on a model; `Hooks` hands on to it what the threads that it serves run.

    Args:
        for_all: whether it serves every thread that opened none of its own; if not, it does so only as long as
            no other is open.

    thread: that opened it.
    """

    def __init__(
        self,
        method: MethodContract,
        model: nn.Module,
        located: Located,
        visual_mask: torch.Tensor | None,
        vision_scores: torch.Tensor | None,
        trace: Trace,
    ):
        self.method, self.model, self.located = method, model, located
        wanted = method.tower()
        if vision_scores is not None:
            wanted = replace(wanted, attention=False, merge=False)
        self.threads = ThreadState()
        self.vision = TowerObserver(
            located.base, located.vision, wanted, method.merge, lambda: self.forward.tower
        )
        self.visual_mask, self.vision_scores = visual_mask, vision_scores
        self.trace = trace
        self.implementation = located.implementation
        # How layers of a prefill run; None runs them as they are.
        self.compiled: CompiledLayers | None = None
        self.keeps_layer_hooks = False
        self.thread, self.for_all, self.is_open = threading.current_thread(), False, False

    @property
    def forward(self) -> Forward:
        """That of this thread."""
        forward = self.threads.forwards.get(self)
        if forward is None:
            forward = self.threads.forwards[self] = Forward()
        return forward

    @property
    def shape(self) -> ModelShape:
        """What a method may know of the model as it is now: it may have been cast to another dtype."""
        return ModelShape(
            num_layers=len(self.located.layers),
            cost=self.located.present_cost(),
            has_vision_scores=self.vision.available or self.vision_scores is not None,
            has_cls=self.vision.parts.has_cls,
            speed=device_speed(self.located) if self.method.needs_speed else None,
            attending=self.located.attending_layers,
        )

    def before_model(self, kwargs: dict) -> None:
        """Assisted decoding sends draft tokens along with the prompt; it asks for their logits."""
        asked, cache = kwargs.get("logits_to_keep"), cache_of(kwargs)
        drafts = asked - 1 if drafts_follow(cache) and isinstance(asked, int) else 0
        self.forward.drafts = drafts

    def before_base(self, args: tuple, kwargs: dict) -> None:
        """Read where the visual tokens of a prompt are, before anything is queued on a GPU."""
        refuse_mode(self.model, kwargs)
        ids = kwargs.get("input_ids", args[0] if args else None)
        if has_pixels(kwargs):
            # The tower runs in this forward; what is left of another one, which failed, is not for it.
            self.vision.forget()
        self.vision.recall(kwargs.get("mm_encoder_outputs"))
        mask, cache = kwargs.get("attention_mask"), cache_of(kwargs)
        forward = self.forward
        drafts, forward.drafts = forward.drafts, 0
        new = ids if ids is not None else kwargs.get("inputs_embeds")
        several = new is not None and new.shape[1] > 1
        has_images = has_pixels(kwargs) or bool(kwargs.get("mm_encoder_outputs"))
        if several and (has_images or self.visual_mask is not None):
            refuse_compiled_parts(self.located, self.vision.parts.observed)
        # A prompt is read before the vision tower is queued, so that a GPU need not be waited for.
        filled = _is_filled(cache, several)
        is_prompt = ids is not None and several and not (filled and PrunedCache.of(cache))
        read, shown = on_host(ids, mask) if is_prompt else (ids, mask)
        found = visual_ids(self.located, read, args, kwargs) if is_prompt else ()
        self.vision.expect(())
        if read is not None and is_prompt and has_pixels(kwargs):
            self._expect(read, shown, found, drafts)
        forward.inputs = Inputs(read, shown, mask, found, has_images, drafts, filled)

    def read_and_expect(self, ids: torch.Tensor, mask: Any) -> None:
        """The same as `before_base` for a tower that runs before the model does, in `generate`."""
        if self.vision.parts.merging:
            read, shown = on_host(ids, mask)
            assert read is not None
            self._expect(read, shown, self.located.visual_ids)

    def _expect(
        self, ids: torch.Tensor, mask: Any, found: tuple[int, ...], drafts: int = 0
    ) -> None:
        """Tell a tower that merges, before it runs, what the prompts keep of their visual tokens."""
        if not self.vision.parts.merging:
            return
        layout = read_layout(ids, mask, ids.shape, found, self.visual_mask, drafts)
        prompts = set(zip(layout.num_visual, layout.num_text, strict=True))
        shape = self.shape
        depth, cost = shape.num_layers, shape.cost
        self.vision.expect(
            [(self.method.capacity(depth, *p, cost=cost)[0], p[0]) for p in prompts if p[0]]
        )

    def before_text(self, kwargs: dict, copies: int) -> Prefill | Decode | None:
        """Begin a prefill or a decoding step; None leaves the decoder alone.

        Args:
            kwargs: the decoder's; what the layers' hooks do in its place is taken out.
            copies: as `generate` makes of each prompt.
        """
        forward = self.forward
        inputs, forward.inputs = forward.inputs, None
        embeds = kwargs.get("inputs_embeds")
        if inputs is None or embeds is None:
            return None
        cache = cache_of(kwargs)
        pruned = PrunedCache.of(cache)
        if inputs.filled and inputs.has_images and (pruned is not None or embeds.shape[1] > 1):
            # The tower has seen them already; the next prompt is not to find them.
            self.vision.forget()
            refuse_new_images(cache)
        if inputs.filled and pruned is not None:
            step = Decode(self.located, pruned, cache, embeds.shape[:2], inputs.given_mask)
            if not step.has_to_do:
                kwargs["attention_mask"] = None
            return step
        if inputs.filled:
            refuse_lost_memory(cache, len(embeds))
            return None
        PrunedCache.forget(cache)
        deepstack = kwargs.get("deepstack_visual_embeds") or ()
        prefill = self._prefill(inputs, embeds, cache, deepstack, copies)
        if prefill is not None and deepstack:
            # The model would add these at full length; the layers' hooks add what is left of them.
            kwargs |= {"deepstack_visual_embeds": None, "visual_pos_masks": None}
        return prefill

    def _prefill(
        self,
        inputs: Inputs,
        embeds: torch.Tensor,
        cache: Any,
        deepstack: Sequence[torch.Tensor],
        copies: int,
    ) -> Prefill | None:
        layout = read_layout(
            inputs.ids,
            inputs.mask,
            embeds.shape,
            inputs.visual_ids,
            self.visual_mask,
            inputs.drafts,
        )
        shape = self.shape
        vision = self._vision_scores(inputs, layout)
        if isinstance(cache, PrunedStaticCache):
            cache.admit(self.method, shape, layout)
        required = [int(ends) for ends in layout.ends_visual]
        pictures = picture_sizes(layout, inputs.ids, self.located.base.config)
        prompts = Prompts(layout.num_visual, layout.num_text, required, copies, pictures)
        state = PromptState(shape, prompts)
        if not any(prompts.num_visual):
            state.schedule = [[0] * shape.num_layers for _ in prompts.num_visual]
            self.trace.record(Record(layout, state))
            return None
        refuse_backend(self.located, self.implementation)
        refuse_cache(self.located, cache, embeds.shape[1])
        self.method.begin(state)
        if not state.prunes:
            self.trace.record(Record(layout, state))
            return None
        return Prefill(
            self.method, self.located, layout, state, embeds.device, cache, vision, deepstack
        )

    def after_text(self, run: Prefill, output: Any) -> Any:
        """End a prefill and record it. There is no output of one that failed."""
        done = False
        try:
            if output is not None:
                output, done = run.finish(output), True
        finally:
            self.method.end(run.state, done)
        if done:
            self.trace.record(run.record())
        return output

    def drop_run(self) -> None:
        """Forget what this thread has left of a forward that was interrupted."""
        forward = self.forward
        run, forward.run = forward.run, None
        if isinstance(run, Prefill):
            self.method.end(run.state, done=False)

    def _vision_scores(self, inputs: Inputs, layout: Layout) -> VisionView | None:
        collected = self.vision.collect(inputs.ids, layout.visual)
        if self.vision_scores is None:
            return collected
        scores = self.vision_scores.flatten()
        total, prompts = sum(layout.num_visual), len(layout.num_visual)
        # Generation may have repeated the prompts.
        copies, rest = divmod(total, max(scores.numel(), 1))
        if not scores.numel() or rest or prompts % max(copies, 1):
            raise ValueError(
                f"vision_scores has {scores.numel()} entries but the prompts hold {total} visual tokens; "
                "pass one score per visual token, prompt by prompt"
            )
        others = {} if collected is None else collected.values
        return VisionView({**others, "vision_scores": scores})


def _is_filled(cache: Any, several: bool) -> bool:
    """Whether new tokens, one or several, find anything in a cache.

    Of a static one this is read from the device. One new token takes it for filled: reading that at every
    step would be dear, and a prompt of one token has nothing to be pruned.
    """
    layers = getattr(cache, "layers", ())
    if cache is None or (not several and layers and is_static(layers[0])):
        return cache is not None
    length = cache.get_seq_length()
    return bool(length > 0) if isinstance(length, torch.Tensor) else length > 0
