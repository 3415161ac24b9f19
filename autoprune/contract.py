"""The contract between a pruning method and the engine.

A method is a frozen dataclass of settings. It says which cuts it may make and what it needs to see for
each (`needs`), and answers each cut with a `Selection` or a `Ranking` (`select`). It never touches a hook, a
mask or a cache: the engine does the locating, tapping, gathering, batching and recording for every method.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from typing import Any, ClassVar, Literal, get_args

import torch

from .policy.budget import Budget
from .policy.cost import DecoderCost
from .policy.time_model import DeviceSpeed

Rows = Literal["text", "last", "all"]
Positions = Literal["original", "compacted"]
POSITIONS: tuple[str, ...] = get_args(Positions)

MOST_ROWS = 128
"""The most text rows of a prompt that `Needs(rows="text")` shows."""

LAST_ROWS = 32
"""How many of these are its last ones, where there are more."""


@dataclass(frozen=True)
class ModelShape:
    """What a method may know of the model it is attached to.

    has_vision_scores: whether the vision tower scores patches; has_cls: whether it has a CLS token.
    speed: what the parts of a prefill take on the model's device; None if the method needs no speed.
    attending: whether each layer attends, where some pass a state on instead; None where all do.
    """

    num_layers: int
    cost: DecoderCost
    has_vision_scores: bool
    has_cls: bool = False
    speed: DeviceSpeed | None = None
    attending: tuple[bool, ...] | None = None


@dataclass(frozen=True)
class Prompts:
    """The prompts of one prefill, in batch order: host numbers only.

    required: of each prompt's visual tokens, how many stay in every layer: 1 where it ends with its
        picture (`Observation.required`), else 0.
    repeats: how often each prompt stands there, one copy behind the other, as `generate` repeats them for
        beams and several answers.
    pictures: of each prompt, how many visual tokens each of its pictures has, in their order; empty where
        that is not known.
    """

    num_visual: Sequence[int]
    num_text: Sequence[int]
    required: Sequence[int] = ()
    repeats: int = 1
    pictures: Sequence[Sequence[int]] = ()

    def __len__(self) -> int:
        return len(self.num_visual)

    def of(self, rows: Sequence[int]) -> Prompts:
        """Some of the prompts."""
        numbers = (self.num_visual, self.num_text, self.required or [0] * len(self))
        visual, text, required = ([values[row] for row in rows] for values in numbers)
        pictures = [self.pictures[row] for row in rows] if self.pictures else ()
        return Prompts(visual, text, required, self.repeats, pictures)


@dataclass(frozen=True)
class Tower:
    """What a method must see of the vision tower, for every picture and video.

    attention: in the block whose output the decoder receives: the CLS token's, or where there is none
        the attention that a patch receives.
    keys: that block's keys.
    received: in that block the attention that a patch receives from all others, the CLS token included.
    middle: the attention that a patch receives in another block, too: the one at this share of the
        tower's depth, in (0, 1].
    places: where each token lies in its picture.
    outside: how far outside of the picture a patch lies where the picture was padded to a square. Given
        beside the tower's own attention only.
    merge: let `Method.merge` merge patches behind each block, so that the tower gets faster too. Done
        where a visual token is one patch and it is known when the tower runs what the prompts keep
        (`Method.capacity` of layer 0); elsewhere the first cut finds all tokens single.
    """

    attention: bool = False
    keys: bool = False
    received: bool = False
    middle: float | None = None
    places: bool = False
    outside: bool = False
    merge: bool = False


@dataclass
class Patches:
    """What a block of the vision tower shows of its P tokens, each of them one or more merged patches.

    keys: float32 [pictures, P, head dim], mean over heads.
    sizes: float32 [pictures, P], patches that each stands for.
    attention: gives float32 [pictures, P], the attention that each of a token's patches gets from the
        CLS token or, where there is none, from the patches.
    has_cls: whether a CLS token stands before them, which is none of the P and takes no part.
    """

    keys: torch.Tensor
    sizes: torch.Tensor
    attention: Callable[[], torch.Tensor]
    has_cls: bool = False


@dataclass(frozen=True)
class Needs:
    """What a method must see to decide one cut.

    rows: query rows of the attention in the layer before the cut; None for no attention. "text": the text
        tokens after the last visual one. Of a prompt with more than MOST_ROWS of them these are a sample,
        as attention of every row would cost more than pruning saves: the last LAST_ROWS, and others evenly
        spaced before them, from the first on. It follows from their number alone, so it is the same at
        every cut and in every batch. "all": every one of them, at that price. "last": only the prompt's last
        token. A prompt that ends with its picture is always looked at from its last token.
    keys: keys and queries of the layer before the cut.
    ahead: take attention, keys and queries from the layer behind the cut instead. Costs the keys of all tokens
        and the queries of the rows a second time; with `keys`, all queries. Where a layer joins its
        projections, or its cache holds latents, all of them.
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
        rows asked for (`Needs.rows`), in their order; "text" where none were asked for.
    no_padding: whether `text_mask` is known to be True throughout, so that no row need be masked.
    required: BoolTensor [batch, V], tokens that stay whatever is decided; None if there are none. That is
        the last token of a prompt that ends with its picture, as its logits are asked for. A selection
        without it has it put in the place of the kept token that stands last; one that ranks it first
        (`selectors.required_first`) loses the worst instead.
    sizes: float32 [batch, V], how many tokens each counts for, where earlier cuts gave sizes
        (`Selection.sizes`); None where each counts for itself.
    vision_scores: float32 [batch, V], NaN for visual tokens without a patch; None if there are none.
    vision_padding: BoolTensor [batch, V], True for patches that only hold the padding of the picture.
    vision_outside: float32 [batch, V], how far a patch's first row or column of pixels lies outside of the
        picture that was padded to a square, in patches; 0 inside of it.
    vision_keys: float32 [batch, V, head dim], the tower's keys, mean over its heads and over the
        patches of a token; NaN for tokens without a patch.
    vision_received, vision_middle: float32 [batch, V], attention received from all patches in the block
        whose output the decoder receives, and in the tower's middle block; NaN likewise.
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
    required: torch.Tensor | None = None
    sizes: torch.Tensor | None = None
    vision_scores: torch.Tensor | None = None
    vision_padding: torch.Tensor | None = None
    vision_outside: torch.Tensor | None = None
    vision_keys: torch.Tensor | None = None
    vision_received: torch.Tensor | None = None
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
        take over; None puts them behind the last visual token, as the released AutoPrune does (before it,
        where a prompt ends with it).
    sizes: float [batch, M], above 0, how many tokens each counts for in attention from now on: its score gets
        log(size). None for 1. Padding may hold any number above 0.
    """

    hidden: torch.Tensor
    counts: list[int]
    place: torch.Tensor | None = None
    sizes: torch.Tensor | None = None


@dataclass(frozen=True)
class Selection:
    """What survives a cut.

    kept: LongTensor [batch, K], positions (0..V-1) in the current visual order, ascending, then -1 as
        padding. Where a prompt gets its summary at this cut (`MethodContract.summary`), the engine adds it.
    counts: how many of them are real, per prompt.
    merged: new tokens beside the kept ones.
    states: [batch, K, hidden size], hidden states that the kept tokens take on, for methods that merge
        dropped tokens into kept ones. Together with `merged`, of all tokens that are left, merged ones
        included, in the order in which they stand.
    sizes: float [batch, K], as `Merged.sizes`, of the kept tokens. None leaves what they had.
    """

    kept: torch.Tensor
    counts: list[int]
    merged: Merged | None = None
    states: torch.Tensor | None = None
    sizes: torch.Tensor | None = None


@dataclass(frozen=True)
class Ranking:
    """How much each visual token matters, from which cuts follow: each keeps the best as `PromptState.schedule`
    says. The prompt's order stays.

    scores: float [batch, V]; ties go to the lower position.
    until: the cuts before all layers up to, but without, this one follow from these scores. The next cut
        alone has `until = cut + 1`. Cuts of one ranking are planned together, so each is nearly free.
    """

    scores: torch.Tensor
    until: int


@dataclass(frozen=True)
class SummaryToken:
    """One token of each prompt that stands for all visual tokens that were dropped.

    It is a slot of the budget: where n tokens enter a layer, n - 1 are kept as they are. Its hidden states
    are the mean of those that were dropped, each as it was when it was dropped; later cuts add to it, weighted
    by number. Its score in attention gets strength * log(number of tokens) in every later layer, for every row
    that sees it, in decoding too. So the softmax keeps the denominator that it had: proportional attention
    (ToMe, ICLR 2023, equation 1) with one group. A prompt of which nothing is dropped has no summary.

    As text: "summary", or "summary strength=0.5 position=last norm=typical".

    strength: 0 or more; 0 leaves the scores as they are, so that flash attention takes it, too; 1 adds the
        whole logarithm.
    position: which dropped token's place it takes: the one nearest to their "mean" position, or the "last".
    norm: "mean" leaves the mean as it is; "typical" scales it to the mean norm of what it is made of.

    Raises:
        ValueError: a setting is none of these.
    """

    strength: float = 1.0
    position: Literal["mean", "last"] = "mean"
    norm: Literal["mean", "typical"] = "mean"

    def __post_init__(self) -> None:
        strength = self.strength
        number = isinstance(strength, Real) and not isinstance(strength, bool)
        if not (number and 0 <= strength < math.inf):
            raise ValueError(
                f"the strength of a SummaryToken must be a number, 0 or more, got {strength!r}"
            )
        for name, allowed in (("position", ("mean", "last")), ("norm", ("mean", "typical"))):
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"the {name} of a SummaryToken must be one of {allowed}, got {getattr(self, name)!r}"
                )

    @classmethod
    def of(cls, text: str) -> SummaryToken:
        """From its form as text.

        Raises:
            ValueError: it is none.
        """
        name, *settings = text.split() or [""]
        given: dict[str, Any] = {}
        for setting in settings:
            key, equals, value = setting.partition("=")
            if not equals or key not in cls.__dataclass_fields__:
                name = ""
            given[key] = float(value) if key == "strength" and _is_number(value) else value
        if name != "summary":
            raise ValueError(
                f'expected "summary", or "summary strength=0.5 position=last norm=typical", got {text!r}'
            )
        return cls(**given)

    def __str__(self) -> str:
        return f"summary strength={self.strength:g} position={self.position} norm={self.norm}"


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


@dataclass
class PromptState:
    """What one prefill carries from cut to cut; a method may keep its own things in `notes`.

    schedule: the planned visual tokens entering each layer, one list per prompt, once it is known.
    mutual_information: bits, one float per prompt, once it is known.
    decision: one sentence on what a method decided by the device's speed, and why; None if it did not.
    prunes: a method that sets it to False in `begin` leaves the prompts whole.
    """

    shape: ModelShape
    prompts: Prompts
    schedule: list[list[int]] | None = None
    mutual_information: list[float] | None = None
    decision: str | None = None
    prunes: bool = True
    notes: dict[str, Any] = field(default_factory=dict)


class MethodContract(abc.ABC):
    """What the engine asks of a way to prune visual tokens under a budget.

    Methods derive from `autoprune.Method`, which adds how a user switches it on.

    released: the options with which it comes closest to its authors' code, where they are not the defaults.
    """

    name: ClassVar[str]
    paper: ClassVar[str]
    released: ClassVar[Mapping[str, Any]] = {}
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
            Exactly `leaving` of each picture join others, and none joins one that leaves: that is checked on
            a CPU alone, since on a GPU it would have to be waited for.
        """
        raise NotImplementedError(f"{type(self).__name__} does not merge in the vision tower")

    @property
    def summary(self) -> SummaryToken | None:
        """What stands for dropped tokens; None discards them.

        The engine makes the summaries, and each is one of the tokens that `PromptState.schedule` counts. A
        `Ranking` needs no more. A `Selection` keeps one token less of a prompt that has no summary yet and
        drops any; later the summary is among the tokens that stay (`Observation.required`).
        """
        return None

    @property
    def needs_speed(self) -> bool:
        """Whether `ModelShape.speed` is to be measured, once for each kind of model and device."""
        return False

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
    def select(self, seen: Observation, state: PromptState) -> Selection | Ranking | None:
        """Decide the cut, or with a `Ranking` several; None keeps everything."""

    def end(self, state: PromptState, done: bool) -> None:  # noqa: B027 - optional for a method
        """Called once per prefill that prunes: `done` behind the last layer, not `done` where it failed."""
