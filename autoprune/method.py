"""The contract between a pruning method and the engine.

A method is a frozen dataclass of settings. It says which cuts it may make and what it needs to see for
each (`needs`), and answers each cut with a `Selection` (`select`). It never touches a hook, a mask or a
cache: the engine does the locating, tapping, gathering, batching and recording for every method alike.
"""

from __future__ import annotations

import abc
import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch

from .budget import Budget
from .cost import DecoderCost

if TYPE_CHECKING:
    from .engine.attach import Attachment

Rows = Literal["text", "last"]
Positions = Literal["original", "compacted"]


@dataclass(frozen=True)
class ModelShape:
    """What a method may know of the model it is attached to."""

    num_layers: int
    cost: DecoderCost
    has_vision_scores: bool


@dataclass(frozen=True)
class Prompts:
    """The prompts of one prefill, in batch order: host numbers only.

    repeats: how often each prompt stands there, one copy behind the other, as `generate` repeats them for
        beams and several answers.
    """

    num_visual: Sequence[int]
    num_text: Sequence[int]
    repeats: int = 1

    def __len__(self) -> int:
        return len(self.num_visual)


@dataclass(frozen=True)
class Tower:
    """What a method must see of the vision tower, for every picture and video.

    attention: in the block whose output the decoder receives: the CLS token's, or where there is none
        the attention that a patch receives.
    keys: that block's keys.
    middle: the attention that a patch receives in another block, too: the one at this share of the
        tower's depth, in (0, 1].
    places: where each token lies in its picture.
    merge: let `Method.merge` merge patches behind each block, so that the tower gets faster too. Done
        where a visual token is one patch and it is known when the tower runs what the prompts keep
        (`Method.capacity` of layer 0); elsewhere the first cut finds all tokens single.
    """

    attention: bool = False
    keys: bool = False
    middle: float | None = None
    places: bool = False
    merge: bool = False


@dataclass
class Patches:
    """What a block of the vision tower shows of its P tokens, each of them one or more merged patches.

    keys: float32 [pictures, P, head dim], mean over heads.
    sizes: float32 [pictures, P], patches that each stands for.
    attention: gives float32 [pictures, P], the attention that each of a token's patches gets from the
        CLS token or, where there is none, from the patches.
    """

    keys: torch.Tensor
    sizes: torch.Tensor
    attention: Callable[[], torch.Tensor]


@dataclass(frozen=True)
class Needs:
    """What a method must see to decide one cut.

    rows: query rows of the attention in the layer before the cut: every text token after the last
        visual one ("text"), or only the prompt's last token ("last"); None for no attention.
    ahead: take that attention from the layer behind the cut instead. Costs that layer's projections
        of all tokens a second time.
    keys: keys and queries of the layer before the cut.
    vision: what `Method.tower` asked for, where the model gives it.
    hidden: hidden states at the cut.
    beside: what must be seen besides, of other rows or of the layer on the cut's other side; shown as
        `Observation.beside`. It says `hidden` if the other does.
    """

    rows: Rows | None = None
    ahead: bool = False
    keys: bool = False
    vision: bool = False
    hidden: bool = False
    beside: Needs | None = None

    def each(self, ahead: bool | None = None) -> list[Needs]:
        """These needs and those beside them; of the layer behind the cut, before it, or of both."""
        beside = [] if self.beside is None else self.beside.each(ahead)
        return [self, *beside] if ahead in (None, self.ahead) else beside


@dataclass
class Observation:
    """What the engine saw for one cut. V is the largest number of visual tokens in the batch.

    Tensors may be views of what the model goes on with: do not write to them.

    counts: visual tokens of each prompt that are present before the cut, merged ones included.
    index: LongTensor [batch, V], original visual index 0..N-1; -2 for a merged token, -1 for padding.
    mask: BoolTensor [batch, V], False for padding.
    attention: float32 [batch, heads, text, V], softmax over every key the row can see, then cut to the
        visual columns (so that a row sums to at most 1); None if not asked for.
    text_mask: BoolTensor [batch, text], False for padding rows, which come first. Text tokens are the
        rows asked for; by default every text token after the last visual one.
    no_padding: whether `text_mask` is known to be True throughout, so that no row need be masked.
    vision_scores: float32 [batch, V], NaN for visual tokens without a patch; None if there are none.
    vision_padding: BoolTensor [batch, V], True for patches that only hold the padding of the picture.
    vision_keys: float32 [batch, V, head dim], the tower's keys, mean over its heads and over the
        patches of a token; NaN for tokens without a patch.
    vision_middle: float32 [batch, V], attention received in the tower's middle block; NaN likewise.
    places: float32 [batch, V, 3], which picture of the batch (or frame, or tile) a token belongs to, and
        its row and column there in tokens; NaN likewise.
    vision_groups: float32 [batch, V], a number for what a token's patch was merged into in the tower:
        tokens of the same number have the same hidden state. NaN likewise; None if nothing was.
    hidden, text_hidden: give the hidden states of the visual tokens [batch, V, hidden size] and of the
        text tokens [batch, text, hidden size].
    keys, text_keys: give rotated keys [batch, key heads, V or text, head dim].
    queries: gives the visual tokens' rotated queries [batch, heads, V, head dim].
    beside: what `Needs.beside` asked for.
    """

    cut: int
    counts: list[int]
    index: torch.Tensor
    mask: torch.Tensor
    attention: torch.Tensor | None = None
    text_mask: torch.Tensor | None = None
    no_padding: bool = False
    vision_scores: torch.Tensor | None = None
    vision_padding: torch.Tensor | None = None
    vision_keys: torch.Tensor | None = None
    vision_middle: torch.Tensor | None = None
    places: torch.Tensor | None = None
    vision_groups: torch.Tensor | None = None
    hidden: Callable[[], torch.Tensor] | None = None
    text_hidden: Callable[[], torch.Tensor] | None = None
    keys: Callable[[], torch.Tensor] | None = None
    text_keys: Callable[[], torch.Tensor] | None = None
    queries: Callable[[], torch.Tensor] | None = None
    beside: Observation | None = None

    @property
    def ragged(self) -> bool:
        """Whether prompts differ in their number of visual tokens; if not, `mask` is True throughout."""
        return min(self.counts) < max(self.counts)


@dataclass(frozen=True)
class Merged:
    """Tokens made from dropped ones.

    hidden: [batch, M, hidden size].
    counts: merged tokens of each prompt; the rest of the M is padding.
    place: LongTensor [batch, M], positions (0..V-1, in the current visual order) that the merged tokens
        take over; None puts them behind the last visual token, as the released AutoPrune does.
    """

    hidden: torch.Tensor
    counts: list[int]
    place: torch.Tensor | None = None


@dataclass(frozen=True)
class Selection:
    """What survives a cut.

    kept: LongTensor [batch, K], positions (0..V-1) in the current visual order, ascending, then -1 as
        padding.
    counts: how many of them are real, per prompt.
    merged: new tokens beside the kept ones.
    states: [batch, K, hidden size], hidden states that the kept tokens take on, for methods that merge
        dropped tokens into kept ones. Together with `merged`, of all tokens that are left, merged ones
        included, in the order in which they stand.
    """

    kept: torch.Tensor
    counts: list[int]
    merged: Merged | None = None
    states: torch.Tensor | None = None


@dataclass
class PromptState:
    """What one prefill carries from cut to cut; a method may keep its own things in `notes`.

    schedule: the planned visual tokens entering each layer, one list per prompt, once it is known.
    mutual_information: bits, one float per prompt, once it is known.
    """

    shape: ModelShape
    prompts: Prompts
    schedule: list[list[int]] | None = None
    mutual_information: list[float] | None = None
    notes: dict[str, Any] = field(default_factory=dict)


class Method(abc.ABC):
    """A way to prune visual tokens under a budget.

    `with method(model) as trace:` prunes everything the model runs inside the block and records it;
    `method.attach(model)` does the same until `detach()` is called on what it returns.
    """

    name: ClassVar[str]
    paper: ClassVar[str]
    budget: Budget
    positions: Positions = "original"

    def tower(self) -> Tower:
        """What must be seen of the vision tower; asked once per model."""
        return Tower(attention=True)

    def merge(self, seen: Patches, leaving: int) -> torch.Tensor:
        """What becomes of the vision tower's tokens behind one of its blocks; for `Tower(merge=True)`.

        Args:
            leaving: how many tokens of each picture are to be merged into others.

        Returns:
            LongTensor [pictures, P], the position of the token that each one joins; its own if it stays.
            Exactly `leaving` of each picture join others, and none joins one that leaves: it is not checked.
        """
        raise NotImplementedError(f"{type(self).__name__} does not merge in the vision tower")

    def check(self, shape: ModelShape) -> None:  # noqa: B027 - optional for a method
        """Raise ValueError if this method cannot run on such a model."""

    def capacity(
        self, num_layers: int, num_visual: int, num_text: int = 0, cost: DecoderCost | None = None
    ) -> list[int]:
        """The most visual tokens that any prompt of this size can have entering each layer, [L].

        Merged tokens count. A static cache is made for it before the prompt is seen; no count may rise
        with `num_text`, or with depth. By default nothing is known but N.

        Args:
            num_layers: L.
            num_visual: N.
            num_text: other tokens of the prompt.
            cost: the decoder's cost.
        """
        return [num_visual] * num_layers

    def begin(self, state: PromptState) -> None:  # noqa: B027 - optional for a method
        """Called once per prefill, before the first layer: plan what can be planned already."""

    @abc.abstractmethod
    def needs(self, cut: int, state: PromptState) -> Needs | None:
        """What must be seen for this cut; None if nothing is cut here. Asked once per cut, in order."""

    @abc.abstractmethod
    def select(self, seen: Observation, state: PromptState) -> Selection | None:
        """Decide the cut; None keeps everything."""

    def __call__(
        self,
        model: torch.nn.Module,
        *,
        visual_mask: torch.Tensor | None = None,
        vision_scores: torch.Tensor | None = None,
    ) -> Attachment:
        """Prepare pruning of `model`; enter the result as a context manager to switch it on.

        Args:
            model: a vision-language model of transformers, in eval mode.
            visual_mask: bool [batch, length], which positions of the prompt are visual. Only needed
                when the model is called with `inputs_embeds` instead of `input_ids`.
            vision_scores: float [batch, N] or [total visual tokens], scores to use instead of the
                vision tower's own.

        Raises:
            UnsupportedError: the model is no vision-language model this library can prune.
            ValueError: the method cannot work on this model, or its budget is infeasible.
        """
        from .engine.attach import Attachment

        return Attachment(self, model, visual_mask=visual_mask, vision_scores=vision_scores)

    def attach(self, model: torch.nn.Module, **options: Any) -> Attachment:
        """Switch pruning on until `detach()` is called on the returned handle."""
        return self(model, **options).attach()


def detach(model: torch.nn.Module) -> None:
    """Switch off all pruning of `model`, by whichever handles and contexts: it is as it was.

    For a handle that was lost. Harmless when nothing is attached.

    Raises:
        ValueError: this is no model.
    """
    from .engine.attach import detach

    detach(model)


_KINDS: dict[str, tuple[type, str]] = {
    "int": (Integral, "a whole number"),
    "float": (Real, "a finite number"),
    "bool": (bool, "True or False"),
}


def check_settings(method: Method) -> None:
    """Raise ValueError for a setting that is not of the kind that its field is declared with."""
    for setting in dataclasses.fields(method):  # type: ignore[arg-type]
        value = getattr(method, setting.name)
        kind, expected = _KINDS.get(str(setting.type), (object, ""))
        fits = isinstance(value, kind) and (kind in (bool, object) or not isinstance(value, bool))
        if not fits or (kind is Real and not math.isfinite(value)):
            raise ValueError(f"{method.name}: {setting.name} must be {expected}, got {value!r}")
