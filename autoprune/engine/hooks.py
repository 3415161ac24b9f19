"""The hooks of one model, which all contexts that are open on it share."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial, wraps
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..errors import UnsupportedError
from .attention import tap
from .cache.argument import cache_of
from .cache.pruned import PrunedCache, is_static, narrowed, static_step
from .compiled import refuse_wrapped
from .cover import Cover
from .decode import Decode
from .forwards import Forwards
from .generate import WATCHED, Repeats
from .locate import Located
from .prefill import Prefill
from .refusals import refuse_compiled_growth, refuse_compiled_prefill
from .vision.merging import watch_encoding
from .vision.tower import MEDIA, VisionTap

if TYPE_CHECKING:
    from .contexts import Context


class _Thread(threading.local):
    """What belongs to one thread.

    bound: the context that its `generate` began with.
    serving: whose forward is under way; run: what that does to the decoder.
    watching: whose method watches the vision tower at work.
    """

    bound: Context | None = None
    serving: Context | None = None
    run: Prefill | Decode | None = None
    watching: Forwards | None = None


class Hooks:
    """The hooks of one model. They hand what a thread runs to the context that serves it.

    That is the one that the thread entered; else the one that serves all threads; else the only one. A call
    of `generate` stays with the context that it began with.
    """

    def __init__(self, located: Located):
        self.located = located
        # Replaced as a whole, as other threads read it.
        self.contexts: tuple[Context, ...] = ()
        self._covers: dict[nn.Module, Cover] = {}
        self._outers: list[nn.Module] = []
        self._tagged: dict[Context, tuple[dict[nn.Module, tap.Handler], set[str]]] = {}
        self._repeats = Repeats()
        self._local = _Thread()

    def refuse_another(self, new: Context) -> None:
        """Raise UnsupportedError if `new` would stand beside a context of its thread."""
        mine = [c for c in self.contexts if c.thread is new.thread or c.forwards is new.forwards]
        if self._local.bound is not None:
            mine.append(self._local.bound)
        if any(context.is_open for context in mine):
            raise UnsupportedError(
                "this model is being pruned already; leave the first context (or detach its handle; "
                "autoprune.detach(model) ends them all) before entering another one"
            )
        if new.for_all and any(context.for_all for context in self.contexts):
            raise UnsupportedError(
                "this model is being pruned already, in all threads; detach that handle "
                "(autoprune.detach(model) ends them all), or prune this thread only, by `with method(model):`"
            )

    def add(self, context: Context) -> None:
        """Serve a context, whose forwards begin when all is in its place."""
        forwards, located = context.forwards, context.forwards.located
        if not self.contexts:
            self._install()
        self._install_outer(located.outer)
        self._install_on(forwards.vision)
        if forwards.compiled is not None:
            self.take_over_layers()
        tagged: dict[nn.Module, tap.Handler] = dict.fromkeys(located.attentions, self._attend)
        tagged |= dict.fromkeys(forwards.vision.tapped, self._attend_in_tower)
        names = {module.config._attn_implementation for module in forwards.vision.tapped}
        names.add(located.implementation)
        forwards.implementation = located.implementation
        tap.tag(tagged, names)
        self._tagged[context] = tagged, names
        context.is_open = True
        self.contexts = (*self.contexts, context)

    def discard(self, context: Context) -> None:
        """Serve a context no longer; the last one leaves the model as it was."""
        context.is_open = False
        self.contexts = tuple(other for other in self.contexts if other is not context)
        context.forwards.vision.reset()
        if context in self._tagged:
            tap.untag(*self._tagged.pop(context))
        context.forwards.forget()
        if not self.contexts:
            for cover in self._covers.values():
                cover.remove()
            self._covers, self._outers = {}, []

    @contextmanager
    def bound(self, context: Context | None) -> Iterator[None]:
        """In this, the thread is served by a context, whatever others are opened meanwhile."""
        before, self._local.bound = self._local.bound, context
        try:
            yield
        finally:
            self._local.bound = before

    def _cover(self, module: nn.Module) -> Cover:
        if module not in self._covers:
            self._covers[module] = Cover(module)
        return self._covers[module]

    def _install(self) -> None:
        base, text, layers = self.located.base, self.located.text, self.located.layers
        self._before(base, self._before_base)
        self._before(text, self._before_text)
        self._cover(text).hook(text.register_forward_hook(self._after_text))
        for index, layer in enumerate(layers):
            self._before(layer, self._layer_hook(index))

    def _install_on(self, vision: VisionTap) -> None:
        """Watch what `vision` watches, which may be more than the contexts so far do."""
        around = {
            f"get_{medium}_features": partial(self._watching, medium)
            for medium in MEDIA
            if vision.watches(medium)
        }
        self._cover(self.located.base).wrap(around)
        blocks = vision.merging.blocks
        if blocks and blocks[0] not in self._covers:
            self._before(blocks[0], self._before_tower)
            for index, block in enumerate(blocks):
                # In front of transformers' own hooks, which record hidden states.
                after = block.register_forward_hook(partial(self._after_block, index), prepend=True)
                self._cover(block).hook(after)

    def _install_outer(self, outer: nn.Module) -> None:
        """Contexts may be opened on the model with its language head, and on the model without."""
        if outer in self._outers:
            return
        self._outers.append(outer)
        if outer is not self.located.base:
            self._before(outer, self._before_model)
        watched = {"generate": self._generating}
        watched |= {"_expand_inputs_for_generation": self._repeats.expanding}
        watched |= watch_encoding(self._tell_prompt, self._forget_prompt)
        self._cover(outer).wrap(WATCHED | watched)

    def take_over_layers(self) -> None:
        """Let each layer's forward run compiled in prefills of contexts that ask for it."""
        for index, layer in enumerate(self.located.layers):
            self._cover(layer).wrap({"forward": partial(self._taking_over, index)})

    def _taking_over(self, index: int, forward: Callable) -> Callable:
        refuse_wrapped(self.located.layers[index], forward)

        @wraps(forward)
        def run_layer(*args, **kwargs):
            if not torch.compiler.is_compiling():
                run, serving = self._local.run, self._local.serving
                if isinstance(run, Prefill) and serving is not None and serving.forwards.compiled:
                    return serving.forwards.compiled.run(run, index, forward, args, kwargs)
            return forward(*args, **kwargs)

        return run_layer

    def _before(self, module: nn.Module, hook: Callable) -> None:
        self._cover(module).hook(module.register_forward_pre_hook(hook, with_kwargs=True))

    def _context(self, contexts: Sequence[Context]) -> Context | None:
        """Which of these serves this thread; None if several could."""
        if self._local.bound is not None:
            return self._local.bound
        thread = threading.current_thread()
        for context in contexts:
            if context.thread is thread and not context.for_all:
                return context
        for context in contexts:
            if context.for_all:
                return context
        return contexts[0] if len(contexts) == 1 else None

    def _only_context(self) -> Context | None:
        """The context that serves this thread; None if pruning has been switched off meanwhile.

        Raises:
            UnsupportedError: several could.
        """
        # Read once: other threads open and close contexts meanwhile.
        contexts = self.contexts
        context = self._context(contexts)
        if context is None and contexts:
            raise UnsupportedError(
                f"{len(contexts)} contexts prune this model in other threads, and none is this thread's; enter "
                "one here (`with method(model):`), or attach one for all threads (method.attach(model))"
            )
        return context if context is not None and context.is_open else None

    def _generating(self, generate: Callable) -> Callable:
        @wraps(generate)
        def watched(*args, **kwargs):
            with self.bound(self._only_context()), self._repeats.counted():
                return generate(*args, **kwargs)

        return watched

    def _watching(self, medium: str, get_features: Callable) -> Callable:
        """`get_image_features` or `get_video_features`, seen by the method that serves this thread."""
        signature = inspect.signature(get_features)

        @wraps(get_features)
        def watched(*args, **kwargs):
            local = self._local
            # A video may be computed by way of the images.
            context = None if local.watching else self._context(self.contexts) or local.serving
            if (
                context is None
                or not context.is_open
                or not context.forwards.vision.watches(medium)
            ):
                return get_features(*args, **kwargs)
            local.watching = context.forwards
            try:
                vision = context.forwards.vision
                return vision.watch(medium, get_features, signature, *args, **kwargs)
            finally:
                local.watching = None

        return watched

    def _tell_prompt(self, ids: torch.Tensor, mask: Any) -> None:
        if (context := self._only_context()) is not None:
            context.forwards.read_and_expect(ids, mask)

    def _forget_prompt(self) -> None:
        if (context := self._only_context()) is not None:
            context.forwards.vision.merging.forget()

    def _before_model(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        if torch.compiler.is_compiling():
            return
        if (context := self._only_context()) is not None:
            context.forwards.before_model(kwargs)

    def _before_base(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        ids = kwargs.get("input_ids", args[0] if args else None)
        if torch.compiler.is_compiling():
            new = ids if ids is not None else kwargs["inputs_embeds"]
            if new.shape[1] > 1:
                refuse_compiled_prefill()
            return
        self._local.serving = context = self._only_context()
        if context is not None:
            context.forwards.before_base(args, kwargs)

    def _before_text(
        self, module: nn.Module, args: tuple, kwargs: dict
    ) -> tuple[tuple, dict] | None:
        if torch.compiler.is_compiling():
            return None
        local = self._local
        local.run = None
        if local.serving is None:
            return None
        kwargs = dict(kwargs)
        local.run = local.serving.forwards.before_text(kwargs, self._repeats.number)
        return args, kwargs

    def _layer_hook(self, index: int) -> Callable:
        """What is done before decoder layer `index`."""

        def before_layer(module: nn.Module, args: tuple, kwargs: dict):
            if torch.compiler.is_compiling():
                return self._compiled_step(index, args, kwargs)
            run = self._local.run
            if run is not None:
                fitting = run.before_layer(index, args, kwargs)
                if fitting is None:
                    return None
                args, kwargs = fitting
            layers = getattr(cache_of(kwargs), "layers", ())
            return args, narrowed(layers[index], kwargs) if index < len(layers) else kwargs

        return before_layer

    def _compiled_step(self, index: int, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        """Decoding inside torch.compile: tensors only, so one graph serves every kept set."""
        cache = cache_of(kwargs)
        layers = getattr(cache, "layers", ())
        if index >= len(layers) or not is_static(layers[index]):
            pruned = PrunedCache.of(cache)
            has_mask = kwargs.get("attention_mask") is not None
            if pruned is not None and (has_mask or not pruned.sees_all(self.located.windows)):
                refuse_compiled_growth()
            return None
        return args, static_step(self.located, layers[index], args[0], kwargs)

    def _attend(self, attend, module, query, key, value, attention_mask, *args, **kwargs):
        """The attention of a decoder layer."""
        run = self._local.run
        if run is not None:
            return run.attend(attend, module, query, key, value, attention_mask, *args, **kwargs)
        return attend(module, query, key, value, attention_mask, *args, **kwargs)

    def _attend_in_tower(self, attend, module, *args, **kwargs):
        """The attention of a block of the vision tower."""
        forwards = self._local.watching
        if forwards is not None:
            return forwards.vision.attend(attend, module, *args, **kwargs)
        return attend(module, *args, **kwargs)

    def _before_tower(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        if (forwards := self._local.watching) is not None:
            forwards.vision.merging.enter(args, kwargs)

    def _after_block(self, index: int, module: nn.Module, args: tuple, output: Any) -> Any:
        """Behind a block of the vision tower."""
        forwards = self._local.watching
        return None if forwards is None else forwards.vision.merging.after(index, output)

    def _after_text(self, module: nn.Module, args: tuple, output: Any) -> Any:
        if torch.compiler.is_compiling():
            return None
        local = self._local
        run, context = local.run, local.serving
        local.run = local.serving = None
        if context is None or not isinstance(run, Prefill):
            return None
        return context.forwards.after_text(run, output)
