"""The hooks of one model, which all contexts that are open on it share."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial, wraps
from typing import Any

import torch
from torch import nn

from ..errors import UnsupportedError
from .attention import tap
from .cache.argument import cache_of
from .cache.pruned import PrunedCache
from .cache.static import is_static, narrowed
from .compiled import CompiledLayers, refuse_wrapped
from .context import Context, ThreadState
from .decode import compiled_step
from .generate import WRAPPERS, around_copying, around_encoding
from .layer_hooks import LayerHooks
from .locate import Located
from .patch import ModulePatch
from .prefill import Prefill
from .refusals import refuse_compiled_growth, refuse_compiled_prefill
from .vision.observer import MEDIA, TowerObserver

# By decoder. One lock for all models: contexts open and close seldom.
_lock = threading.RLock()
_hooked: dict[nn.Module, Hooks] = {}


def open_context(context: Context, for_all: bool) -> None:
    """Install the hooks of its model, or share those of the contexts that are open.

    Args:
        for_all: whether it serves every thread that opened none of its own; if not, it does so only as long as
            no other is open.

    Raises:
        UnsupportedError: this thread has an open one already.
    """
    text = context.located.text
    context.thread, context.for_all = threading.current_thread(), for_all
    with _lock:
        hooks = _hooked.get(text) or Hooks(context.located)
        hooks.refuse_another(context)
        try:
            hooks.add(context)
        except BaseException:
            hooks.discard(context)
            raise
        _hooked[text] = hooks


def close_context(context: Context) -> None:
    """Take the hooks out, unless others need them; harmless if it is not open."""
    text = context.located.text
    with _lock:
        if context.is_open:
            hooks = _hooked[text]
            hooks.discard(context)
            if not hooks.contexts:
                del _hooked[text]


def close_all(model: nn.Module) -> None:
    """Close every context that is open on `model`, or on a part of it that holds the decoder."""
    with _lock:
        for module in model.modules():
            if (hooks := _hooked.get(module)) is not None:
                for context in hooks.contexts:
                    close_context(context)


def compile_layers(context: Context, layers: CompiledLayers) -> None:
    """Run the layers of this context's prefills compiled, from now on."""
    with _lock:
        if context.is_open:
            _hooked[context.located.text].take_over_layers()
        context.compiled = layers


def keep_layer_hooks(context: Context) -> None:
    """Leave the layers' hooks where they are, as compiled decoding on a static cache traces them."""
    with _lock:
        context.keeps_layer_hooks = True
        if context.is_open:
            _hooked[context.located.text].on_layers.keep()


@contextmanager
def served_by(context: Context) -> Iterator[None]:
    """In this, the thread is served by an open context, whatever others there are."""
    with _hooked[context.located.text].bound(context):
        yield


class Hooks:
    """The hooks of one model. They hand what a thread runs to the context that serves it.

    That is the one that the thread entered; else the one that serves all threads; else the only one. A call
    of `generate` stays with the context that it began with.
    """

    def __init__(self, located: Located):
        self.located = located
        # Replaced as a whole, as other threads read it.
        self.contexts: tuple[Context, ...] = ()
        self._patches: dict[nn.Module, ModulePatch] = {}
        self._outers: list[nn.Module] = []
        self._tagged: dict[Context, tuple[dict[nn.Module, tap.Handler], set[str]]] = {}
        self._thread = ThreadState()
        self.on_layers = LayerHooks(located.layers, self._before_layer)

    def refuse_another(self, new: Context) -> None:
        """Raise UnsupportedError if `new` would stand beside a context of its thread."""
        mine = [c for c in self.contexts if c.thread is new.thread or c is new]
        if self._thread.bound is not None:
            mine.append(self._thread.bound)
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
        located, observed = context.located, context.vision.parts.observed
        if not self.contexts:
            self._install()
        self._install_outer(located.outer)
        self._install_on(context.vision)
        if context.compiled is not None:
            self.take_over_layers()
        if context.keeps_layer_hooks:
            self.on_layers.keep()
        tagged: dict[nn.Module, tap.Handler] = dict.fromkeys(located.attending, self._attend)
        tagged |= dict.fromkeys(observed, self._attend_in_tower)
        modules: list[Any] = list(observed)
        names: set[str] = {module.config._attn_implementation for module in modules}
        names.add(located.implementation)
        context.implementation, context.threads = located.implementation, self._thread
        tap.tag(tagged, names)
        self._tagged[context] = tagged, names
        context.is_open = True
        self.contexts = (*self.contexts, context)

    def discard(self, context: Context) -> None:
        """Serve a context no longer; the last one leaves the model as it was."""
        context.is_open = False
        self.contexts = tuple(other for other in self.contexts if other is not context)
        # What is left of a forward that did not come to its end. Those of other threads may be under way.
        if context in self._thread.forwards:
            context.drop_run()
            del self._thread.forwards[context]
        if context in self._tagged:
            tap.untag(*self._tagged.pop(context))
        if not self.contexts:
            self.on_layers.remove()
            for patch in self._patches.values():
                patch.remove()
            self._patches, self._outers = {}, []

    @contextmanager
    def bound(self, context: Context | None) -> Iterator[None]:
        """In this, the thread is served by a context, whatever others are opened meanwhile."""
        before, self._thread.bound = self._thread.bound, context
        try:
            yield
        finally:
            self._thread.bound = before

    def _patch(self, module: nn.Module) -> ModulePatch:
        if module not in self._patches:
            self._patches[module] = ModulePatch(module)
        return self._patches[module]

    def _install(self) -> None:
        base, text = self.located.base, self.located.text
        self._before(base, self._before_base)
        self._before(text, self._before_text)
        after = text.register_forward_hook(self._after_text, always_call=True)
        self._patch(text).hook(after)
        self.on_layers.patches = [self._patch(layer) for layer in self.located.layers]

    def _install_on(self, vision: TowerObserver) -> None:
        """Watch what `vision` watches, which may be more than the contexts so far do."""
        around = {
            f"get_{medium}_features": partial(self._watching, medium)
            for medium in MEDIA
            if vision.watches(medium)
        }
        self._patch(self.located.base).wrap(around)
        blocks = vision.parts.merging
        if blocks and blocks[0] not in self._patches:
            self._before(blocks[0], self._before_tower)
            for index, block in enumerate(blocks):
                # In front of transformers' own hooks, which record hidden states.
                after = block.register_forward_hook(partial(self._after_block, index), prepend=True)
                self._patch(block).hook(after)

    def _install_outer(self, outer: nn.Module) -> None:
        """Contexts may be opened on the model with its language head, and on the model without."""
        if outer in self._outers:
            return
        self._outers.append(outer)
        if outer is not self.located.base:
            self._before(outer, self._before_model)
        wrappers = {"generate": self._generating}
        wrappers |= around_copying(partial(setattr, self._thread, "copies"))
        wrappers |= around_encoding(self._tell_prompt, self._forget_prompt)
        self._patch(outer).wrap(WRAPPERS | wrappers)

    def take_over_layers(self) -> None:
        """Let each layer's forward run compiled in prefills of contexts that ask for it."""
        for index, layer in enumerate(self.located.layers):
            self._patch(layer).wrap({"forward": partial(self._taking_over, index)})

    def _taking_over(self, index: int, forward: Callable) -> Callable:
        refuse_wrapped(self.located.layers[index], forward)

        @wraps(forward)
        def run_layer(*args: Any, **kwargs: Any) -> Any:
            context = None if torch.compiler.is_dynamo_compiling() else self._thread.serving
            if context is not None and context.compiled is not None:
                run = context.forward.run
                if isinstance(run, Prefill):
                    return context.compiled.run(run, index, forward, args, kwargs)
            return forward(*args, **kwargs)

        return run_layer

    def _before(self, module: nn.Module, hook: Callable) -> None:
        self._patch(module).hook(module.register_forward_pre_hook(hook, with_kwargs=True))

    def _context(self, contexts: Sequence[Context]) -> Context | None:
        """Which of these serves this thread; None if several could."""
        if self._thread.bound is not None:
            return self._thread.bound
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
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            copies, self._thread.copies = self._thread.copies, 1
            try:
                with self.bound(self._only_context()):
                    return generate(*args, **kwargs)
            finally:
                self._thread.copies = copies

        return wrapped

    def _watching(self, medium: str, get_features: Callable) -> Callable:
        """`get_image_features` or `get_video_features`, seen by the method that serves this thread."""
        signature = inspect.signature(get_features)

        @wraps(get_features)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            thread = self._thread
            # A video may be computed by way of the images.
            context = None if thread.watching else self._context(self.contexts) or thread.serving
            if context is None or not context.is_open or not context.vision.watches(medium):
                return get_features(*args, **kwargs)
            thread.watching = context
            try:
                return context.vision.watch(medium, get_features, signature, *args, **kwargs)
            finally:
                thread.watching = None

        return wrapped

    def _tell_prompt(self, ids: torch.Tensor, mask: Any) -> None:
        if (context := self._only_context()) is not None:
            context.read_and_expect(ids, mask)

    def _forget_prompt(self) -> None:
        if (context := self._only_context()) is not None:
            context.vision.expect(())

    def _before_model(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        if torch.compiler.is_dynamo_compiling():
            return
        if (context := self._only_context()) is not None:
            context.before_model(kwargs)

    def _before_base(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        ids = kwargs.get("input_ids", args[0] if args else None)
        if torch.compiler.is_dynamo_compiling():
            new = ids if ids is not None else kwargs["inputs_embeds"]
            if new.shape[1] > 1:
                refuse_compiled_prefill()
            return
        self._thread.serving = context = self._only_context()
        if context is not None:
            context.before_base(args, kwargs)

    def _before_text(
        self, module: nn.Module, args: tuple, kwargs: dict
    ) -> tuple[tuple, dict] | None:
        cache = cache_of(kwargs)
        layers: Any = getattr(cache, "layers", ())
        if torch.compiler.is_dynamo_compiling():
            pruned = PrunedCache.of(cache)
            if pruned is not None and not is_static(layers[0]):
                has_mask = kwargs.get("attention_mask") is not None
                if has_mask or not pruned.sees_all(self.located.windows):
                    refuse_compiled_growth()
            return None
        context = self._thread.serving
        needed = bool(layers) and is_static(layers[0])
        if context is None:
            self.on_layers.begin(needed)
            return None
        kwargs = dict(kwargs)
        forward = context.forward
        context.drop_run()
        forward.run = context.before_text(kwargs, self._thread.copies)
        if forward.run is not None and self.located.shares_keys and "logits_to_keep" in kwargs:
            # The model would run the layers that read earlier keys for the last tokens alone.
            kwargs["logits_to_keep"] = 0
        self.on_layers.begin(needed or (forward.run is not None and forward.run.has_to_do))
        return args, kwargs

    def _run(self) -> Any:
        context = self._thread.serving
        return None if context is None else context.forward.run

    def _before_layer(self, index: int, module: nn.Module, args: tuple, kwargs: dict) -> Any:
        """What is done before decoder layer `index`."""
        if torch.compiler.is_dynamo_compiling():
            return self._compiled_step(index, args, kwargs)
        run = self._run()
        if run is not None:
            fitting = run.before_layer(index, args, kwargs)
            if fitting is None:
                return None
            args, kwargs = fitting
        layers = getattr(cache_of(kwargs), "layers", ())
        return args, narrowed(layers[index], kwargs) if index < len(layers) else kwargs

    def _compiled_step(self, index: int, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        """Decoding inside torch.compile: tensors only, so one graph serves every kept set."""
        layers = getattr(cache_of(kwargs), "layers", ())
        if index >= len(layers) or not is_static(layers[index]):
            return None
        return args, compiled_step(self.located, layers[index], args[0], kwargs)

    def _attend(
        self,
        attend: Callable,
        module: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: Any,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """The attention of a decoder layer."""
        run = self._run()
        if run is not None:
            return run.attend(attend, module, query, key, value, attention_mask, *args, **kwargs)
        return attend(module, query, key, value, attention_mask, *args, **kwargs)

    def _attend_in_tower(self, attend: Callable, module: Any, *args: Any, **kwargs: Any) -> Any:
        """The attention of a block of the vision tower."""
        if (context := self._thread.watching) is not None:
            return context.vision.attend(attend, module, *args, **kwargs)
        return attend(module, *args, **kwargs)

    def _before_tower(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        if (context := self._thread.watching) is not None:
            context.vision.before_blocks(args, kwargs)

    def _after_block(self, index: int, module: nn.Module, args: tuple, output: Any) -> Any:
        """Behind a block of the vision tower."""
        context = self._thread.watching
        return None if context is None else context.vision.after_block(index, output)

    def _after_text(self, module: nn.Module, args: tuple, output: Any) -> Any:
        if torch.compiler.is_dynamo_compiling():
            return None
        context, self._thread.serving = self._thread.serving, None
        self.on_layers.end()
        if context is None:
            return None
        run, context.forward.run = context.forward.run, None
        return context.after_text(run, output) if isinstance(run, Prefill) else None
