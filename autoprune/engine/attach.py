"""Switch pruning on and off for one model: hooks in, hooks out, nothing left behind."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from ..errors import UnsupportedError
from ..method import ModelShape, Prompts, PromptState
from ..trace import Trace
from . import tap
from .cache import Decode, PrunedCache, is_static, sliding_window, static_step
from .layout import Layout
from .locate import locate
from .prefill import Prefill
from .vision import VisionScores, VisionTap

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
        self.vision = VisionTap(self.located.base, self.located.vision)
        self.visual_mask = None if visual_mask is None else torch.atleast_2d(visual_mask)
        self.vision_scores = vision_scores
        self.trace = Trace()
        self.shape = ModelShape(
            num_layers=len(self.located.layers),
            cost=self.located.cost,
            has_vision_scores=self.vision.available or vision_scores is not None,
        )
        self._check_positions()
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
        if self.model.training:
            raise UnsupportedError("the model is in training mode; call model.eval() before pruning it")
        located = self.located
        hook = {"with_kwargs": True}
        try:
            _attached.add(located.text)
            if located.outer is not located.base:
                self._handles.append(located.outer.register_forward_pre_hook(self._before_model, **hook))
            self._handles.append(located.base.register_forward_pre_hook(self._before_base, **hook))
            self._handles.append(located.text.register_forward_pre_hook(self._before_text, **hook))
            self._handles.append(located.text.register_forward_hook(self._after_text))
            for index, layer in enumerate(located.layers):
                self._handles.append(layer.register_forward_pre_hook(self._layer_hook(index), **hook))
            self.vision.install()
            self._watch_generate()
            self._tagged = {module: self._observe for module in located.attentions}
            if self.vision.attention is not None:
                self._tagged[self.vision.attention] = self.vision.observe
            self._implementations = {located.implementation}
            if self.vision.attention is not None:
                self._implementations.add(self.vision.attention.config._attn_implementation)
            tap.tag(self._tagged, self._implementations)
        except BaseException:
            self.detach()
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
        self.located.outer.__dict__.pop("_prefill", None)
        if hasattr(self, "_tagged"):
            tap.untag(self._tagged, self._implementations)
            del self._tagged
        _attached.discard(self.located.text)
        self._local = threading.local()

    def _watch_generate(self) -> None:
        """Refuse a chunked prefill before it runs: its first forward cannot be told from a whole prompt."""
        prefill = getattr(self.located.outer, "_prefill", None)
        if prefill is None:
            return

        def watched(input_ids, generation_config, *args, **kwargs):
            if getattr(generation_config, "prefill_chunk_size", None) is not None:
                raise UnsupportedError(
                    "a prefill in chunks cannot be pruned, since a chunk does not see the whole question; "
                    "leave prefill_chunk_size at None"
                )
            return prefill(input_ids, generation_config, *args, **kwargs)

        self.located.outer._prefill = watched

    # Hooks ------------------------------------------------------------------------------------------

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
                _refuse_compiled_prefill()
            return
        self._local.prompt = {
            "input_ids": ids,
            "attention_mask": kwargs.get("attention_mask"),
            "has_images": any(
                value is not None and (name.startswith("pixel_values") or (name == "mm_encoder_outputs" and value))
                for name, value in kwargs.items()
            ),
        }

    def _before_text(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        if torch.compiler.is_compiling():
            return None
        local = self._local
        local.run = None
        prompt, local.prompt = getattr(local, "prompt", None), None
        if self.model.training:
            raise UnsupportedError("the model was put in training mode; call model.eval() before pruning it")
        self._refuse(kwargs)
        embeds = kwargs.get("inputs_embeds")
        if prompt is None or embeds is None:
            return None
        cache = kwargs.get("past_key_values")
        valid = prompt["attention_mask"]
        valid = valid if isinstance(valid, torch.Tensor) and valid.ndim == 2 else None
        if cache is not None and (pruned := PrunedCache.of(cache)) is not None and self._length(cache):
            self._refuse_new_images(prompt)
            local.run = Decode(self, pruned, cache, embeds.shape[1], valid)
        elif cache is None or not self._length(cache):
            PrunedCache.forget(cache)
            deepstack = kwargs.get("deepstack_visual_embeds") or ()
            local.run = self._prefill(prompt, embeds, cache, deepstack)
            if local.run is not None and deepstack:
                # The model would add these at full length; the layers' hooks add what is left of them.
                return args, {**kwargs, "deepstack_visual_embeds": None, "visual_pos_masks": None}
        elif embeds.shape[1] > 1:
            self._refuse_new_images(prompt)
        return None

    def _prefill(
        self, prompt: dict, embeds: torch.Tensor, cache: Any, deepstack: Sequence[torch.Tensor]
    ) -> Prefill | None:
        layout = self._layout(prompt, embeds)
        if layout is None:
            return None
        vision = self._vision_scores(prompt, layout)
        prompts = Prompts(layout.num_visual, layout.num_text)
        state = PromptState(self.shape, prompts)
        if not any(prompts.num_visual):
            state.schedule = [[0] * self.shape.num_layers for _ in prompts.num_visual]
            self.trace.record(layout, state, [])
            return None
        self._refuse_for_pruning(cache, embeds.shape[1])
        return Prefill(self, layout, state, embeds.device, cache, vision, deepstack)

    def _layer_hook(self, index: int):
        def before_layer(module: nn.Module, args: tuple, kwargs: dict):
            if torch.compiler.is_compiling():
                return self._compiled_step(index, args, kwargs)
            run = getattr(self._local, "run", None)
            return None if run is None else run.before_layer(index, args, kwargs)

        return before_layer

    def _compiled_step(self, index: int, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        """Decoding inside torch.compile: tensors only, so one graph serves every kept set."""
        layers = getattr(kwargs.get("past_key_values"), "layers", ())
        if index >= len(layers) or not is_static(layers[index]):
            return None
        kwargs = static_step(self.located, layers[index], args[0], kwargs)
        return None if kwargs is None else (args, kwargs)

    def _observe(self, module, query, key, attention_mask, **kwargs) -> None:
        run = getattr(self._local, "run", None)
        if isinstance(run, Prefill):
            run.observe(module, query, key, attention_mask, **kwargs)

    def _after_text(self, module: nn.Module, args: tuple, output: Any) -> Any:
        if torch.compiler.is_compiling():
            return None
        run, self._local.run = getattr(self._local, "run", None), None
        if not isinstance(run, Prefill):
            return None
        output = run.finish(output)
        self.trace.record(run.layout, run.state, run.records)
        return output

    # What the prompt looks like ---------------------------------------------------------------------

    def _layout(self, prompt: dict, embeds: torch.Tensor) -> Layout | None:
        ids, mask = prompt["input_ids"], prompt["attention_mask"]
        batch, length = embeds.shape[:2]
        if self.visual_mask is not None:
            visual = self._given_mask(batch, length)
        elif ids is not None:
            ids = ids.cpu().numpy()
            visual = np.isin(ids, self.located.visual_ids)
        else:
            raise UnsupportedError(
                "the model was called with inputs_embeds only, so nothing says which tokens are visual; "
                "pass method(model, visual_mask=...), bool [batch, length]"
            )
        real = _real_tokens(mask, batch, length)
        return Layout(real, visual & real, getattr(self._local, "drafts", 0))

    def _given_mask(self, batch: int, length: int) -> np.ndarray:
        mask = self.visual_mask
        assert mask is not None
        if mask.shape[1] != length or batch % mask.shape[0]:
            raise ValueError(
                f"visual_mask has shape {list(mask.shape)} but the prompt is [{batch}, {length}]; "
                "pass one row per prompt and one column per position"
            )
        return mask.bool().repeat_interleave(batch // mask.shape[0], dim=0).cpu().numpy()

    def _vision_scores(self, prompt: dict, layout: Layout) -> VisionScores | None:
        collected = self.vision.take(prompt["input_ids"], layout.visual)
        if self.vision_scores is None:
            return collected
        scores = torch.as_tensor(self.vision_scores, dtype=torch.float32).flatten()
        total = sum(layout.num_visual)
        if not scores.numel() or total % scores.numel():
            raise ValueError(
                f"vision_scores has {scores.numel()} entries but the prompts hold {total} visual tokens; "
                "pass one score per visual token, prompt by prompt"
            )
        return VisionScores(scores, None)

    @staticmethod
    def _length(cache: Any) -> bool:
        length = cache.get_seq_length()
        return bool(length > 0) if isinstance(length, torch.Tensor) else length > 0

    # Refusals ---------------------------------------------------------------------------------------

    def _check_positions(self) -> None:
        if self.method.positions == "original":
            return
        rope = getattr(self.located.text.config, "rope_parameters", None) or {}
        if not hasattr(self.located.text, "rotary_emb") or "mrope_section" in rope:
            raise UnsupportedError(
                f"{type(self.located.text).__name__} has no one-dimensional rotary positions to compact; "
                "use positions='original'"
            )

    def _refuse(self, kwargs: dict) -> None:
        if "cache" in kwargs:
            raise UnsupportedError("continuous batching cannot be combined with pruning; use model.generate")

    def _refuse_for_pruning(self, cache: Any, length: int) -> None:
        layers = getattr(cache, "layers", ())
        if any(is_static(layer) and getattr(layer, "is_sliding", False) for layer in layers):
            raise UnsupportedError(
                "static caches of models with sliding layers cannot be pruned; use the default cache"
            )

        config = self.located.text.config
        windows = {sliding_window(config, i) for i in range(self.shape.num_layers)} - {None}
        if "flash" in self.located.implementation and windows and min(windows) < length:
            raise UnsupportedError(
                f"flash attention would count its sliding window of {min(windows)} in kept tokens, not in "
                "positions; use attn_implementation='sdpa'"
            )

    def _refuse_new_images(self, prompt: dict) -> None:
        if prompt["has_images"]:
            raise UnsupportedError(
                "new images on top of a filled cache cannot be pruned (neither a later turn nor a chunked "
                "prefill); run the whole conversation as one prompt"
            )


@torch.compiler.disable
def _refuse_compiled_prefill() -> None:
    # Outside the compiled region: an error raised inside it would only make torch.compile step aside.
    raise UnsupportedError("a prefill inside torch.compile cannot be pruned; compile decoding only")


def _real_tokens(mask: Any, batch: int, length: int) -> np.ndarray:
    """bool [batch, length], False for padding, from a 2-D mask, a 4-D mask's last row, or none.

    Some families prepare one 4-D mask per type of layer before they are called.
    """
    if isinstance(mask, dict):
        mask = mask.get("full_attention")
    if not isinstance(mask, torch.Tensor):
        return np.ones((batch, length), dtype=bool)
    if mask.ndim == 4:
        mask = mask[:, 0, -1, :length]
        mask = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
        mask = mask.expand(batch, -1)
    return mask[:, -length:].bool().cpu().numpy()
