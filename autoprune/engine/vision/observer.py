"""What methods see of the vision tower, in the order in which the decoder sees the visual tokens.

The tower's attention is observed in the block whose output the decoder receives. With a CLS token a
patch's score is the CLS row; without one it is the attention that the patch receives within its picture.
The model's own packing then carries scores, keys and places from patches to visual tokens.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor, nn
from transformers.utils import ModelOutput

from ...contract import Tower
from ...errors import UnsupportedError
from ..locate import Model
from .call import Call
from .maps import as_configured
from .merging import Prompts, Rule, plan_merging
from .tower import TowerParts
from .view import VisionView, in_prompt_order

MEDIA = ("image", "video")
# What was seen of the tower travels with the features it belongs to, under this name.
ATTRIBUTE = "_autoprune"
# What the tower's output holds beside the features that the decoder reads.
INTERMEDIATE = {"last_hidden_state", "hidden_states", "attentions"}


@dataclass
class TowerState:
    """What one thread knows of a tower, from one hook to the next.

    call: the computation that is under way.
    expected: the prompts that the next one belongs to.
    ready: what was seen in those that are over, by medium; it waits for its forward.
    """

    call: Call | None = None
    expected: Prompts = ()
    ready: dict[str, VisionView] = field(default_factory=dict)


class TowerObserver:
    """Collects what was asked for while a model computes its image and video features.

    It watches `get_image_features` and `get_video_features` (generation calls them ahead of the
    forward, a plain forward inside it). What was seen waits, per thread, for `collect`, and stays
    with the features for when they are used again (`mm_encoder_outputs`). A family that is not in the
    table gives nothing.

    Keys are those the attention uses: where a tower rotates them by their place (Qwen, Pixtral), a
    token's key is a mean over rotations that differ by a patch or so. Where the middle block looks at
    windows only (Qwen2.5-VL), attention is received within the window; a CLS token gives some, too.

    Args:
        base: the model without its language head.
        vision: its vision tower.
        wanted: what the method must see.
        rule: how it merges patches, if it wants to.
        state: gives what this thread knows of the tower.
    """

    def __init__(
        self,
        base: Model,
        vision: nn.Module,
        wanted: Tower,
        rule: Rule,
        state: Callable[[], TowerState],
    ):
        self.base, self.rule, self._state = base, rule, state
        self.parts = TowerParts.of(base, vision, wanted)

    @property
    def state(self) -> TowerState:
        """That of this thread."""
        return self._state()

    @property
    def available(self) -> bool:
        """Whether the tower gives scores, be they wanted or not."""
        return self.parts.attention is not None

    def watches(self, medium: str) -> bool:
        """Whether anything is to be seen while features of that medium are computed."""
        return bool(self.parts.observed) and getattr(self.parts.layout, medium) is not None

    def expect(self, prompts: Prompts) -> None:
        """Tell to which prompts the next computation belongs; to none, and no patches merge."""
        self.state.expected = prompts

    def forget(self) -> None:
        """Drop what waits for `collect` in this thread."""
        self.state.ready = {}

    def collect(self, input_ids: Tensor | None, visual: np.ndarray) -> VisionView | None:
        """What was seen in this thread since the last call, in the order of the prompts.

        Args:
            input_ids: [batch, length]; tells videos from images where both were seen.
            visual: bool [batch, length], the visual tokens.
        """
        ready = self.state.ready
        self.expect(())
        self.forget()
        if len(ready) < 2:
            return next(iter(ready.values()), None)
        if input_ids is None:
            return None
        is_video = input_ids.numpy(force=True) == self.base.config.video_token_id
        kinds = [kind[seen] for kind, seen in zip(is_video, visual, strict=True)]
        return in_prompt_order(ready["image"], ready["video"], kinds)

    def recall(self, encoded: Mapping[str, Any] | None) -> None:
        """Have ready what was seen when these features were computed, for features that are used again.

        Args:
            encoded: the model's `mm_encoder_outputs`: what `get_image_features` and
                `get_video_features` returned, by medium.
        """
        for medium, features in (encoded or {}).items():
            if (view := getattr(features, ATTRIBUTE, None)) is not None:
                self.state.ready[medium] = view

    def encode(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Features of pictures and videos, by medium, with what was seen of the tower.

        Args:
            inputs: what the processor gave; the rest of it is passed over.

        Raises:
            ValueError: there are neither pictures nor videos in it.
            UnsupportedError: videos for a model that takes none.
        """
        self.expect(())
        encoded = {}
        for medium, pixels in zip(MEDIA, ("pixel_values", "pixel_values_videos"), strict=True):
            if inputs.get(pixels) is None:
                continue
            features = getattr(self.base, f"get_{medium}_features", None)
            if features is None:
                raise UnsupportedError(
                    f"{type(self.base).__name__} takes no {medium}s, but {pixels} was given; leave it out"
                )
            known = inspect.signature(features).parameters
            output = features(**{name: inputs[name] for name in known if name in inputs})
            encoded[medium] = same_features(output, without=INTERMEDIATE)
        if not encoded:
            given = ", ".join(inputs) or "nothing"
            raise ValueError(
                "encode needs pixel_values or pixel_values_videos, as the processor makes them of pictures and "
                f"videos, but got {given}; pass all that the processor gave"
            )
        self.forget()
        return encoded

    def watch(
        self, medium: str, get_features: Callable, signature: Any, *args: Any, **kwargs: Any
    ) -> Any:
        """Call `get_image_features` or `get_video_features`, and keep what is seen meanwhile."""
        arguments = dict(signature.bind(*args, **kwargs).arguments)
        # Older releases pass a picture's size on without naming it.
        arguments |= arguments.pop("kwargs", {})
        state = self.state
        prompts = state.expected if as_configured(self.base, arguments) else ()
        state.call = call = Call(self.parts, arguments, prompts)
        self.expect(())
        try:
            features = get_features(*args, **kwargs)
        finally:
            state.call = None
        if call.pictures:
            view = state.ready[medium] = call.view(medium)
            if isinstance(features, ModelOutput):
                setattr(features, ATTRIBUTE, view)
        return features

    def before_blocks(self, args: tuple, kwargs: dict[str, Any]) -> None:
        """Before the first of `TowerParts.merging`, with what it is called with."""
        if (call := self.state.call) is not None:
            blocks = len(self.parts.merging)
            call.merged = plan_merging(args, kwargs, call.prompts, blocks, self.parts.has_cls)

    def after_block(self, index: int, output: Tensor) -> Tensor | None:
        """What the output of one of `TowerParts.merging` becomes; None leaves it."""
        call = self.state.call
        if call is None or (merged := call.merged) is None:
            return None
        if index == len(self.parts.merging) - 1:
            call.merged = None
        return merged.after_block(index, self.rule, output)

    def attend(
        self,
        attend: Callable,
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Any,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """The attention of one of the tower's blocks, observed, and to tokens by their patches."""
        if (call := self.state.call) is not None:
            call.observe(module, query, key, attention_mask, **kwargs)
            if call.merged is not None:
                backend = module.config._attn_implementation
                added = call.merged.attended(backend, query, key, kwargs.get("scaling"))
                attention_mask = attention_mask if added is None else added
        return attend(module, query, key, value, attention_mask, *args, **kwargs)


def has_pixels(arguments: Mapping[str, Any]) -> bool:
    """Whether a model is given pictures or videos that its tower has not seen yet."""
    return any(
        name.startswith("pixel_values") and value is not None for name, value in arguments.items()
    )


def same_features(output: Any, without: Collection[str] = ()) -> Any:
    """A tower's output in a container of its own, with what was seen of the tower.

    Args:
        without: names of what is left out.
    """
    if not isinstance(output, ModelOutput):
        return output
    same = type(output)(**{name: value for name, value in output.items() if name not in without})
    if (view := getattr(output, ATTRIBUTE, None)) is not None:
        setattr(same, ATTRIBUTE, view)
    return same
