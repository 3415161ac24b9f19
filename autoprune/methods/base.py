"""What methods derive from.

`Method` is what a user calls. Most methods know their schedule before the prompt is read: all but the adaptive
ones. Such a method is a shape of schedule, a cut or a few, and a rule for each cut. Derive from
`PreDecoder` (one cut before the decoder), `TowerScored` (the same, by what the vision tower shows),
`AfterLayer` (one cut between two layers) or `Planned`, and write `score` (the best are kept) or `choose`
(anything else).
"""

from __future__ import annotations

import abc
import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from numbers import Integral, Real
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn, TypeVar

import torch

from ..contract import (
    POSITIONS,
    MethodContract,
    ModelShape,
    Needs,
    Observation,
    Positions,
    PromptState,
    Selection,
    SummaryToken,
    Tower,
)
from ..parts.mergers import as_summary, in_order
from ..parts.selectors import required_first, top_k
from ..policy.cost import DecoderCost
from ..policy.schedules import at_depth, check_size, fit_schedule, schedule_from_cuts
from ..trace import Sample
from .any_budget import AnyBudget
from .tuned_file import ModelIdentity, TunedFile, as_setting

if TYPE_CHECKING:
    from ..engine.attach import Attachment

# A server may run for days.
KEPT_BY_A_HANDLE = 1000

Loaded = TypeVar("Loaded", bound="Method")


class Method(MethodContract):
    """A way to prune visual tokens under a budget.

    `with method(model) as trace:` prunes everything the model runs inside the block and records it;
    `method.attach(model)` does the same until `detach()` is called on what it returns.

    shares_budgets: whether its budget may be one over a batch or a stream, see `Budget`.
    """

    shares_budgets: ClassVar[bool] = False
    tuned_for: ClassVar[ModelIdentity | None] = None
    """The model that a loaded method was tuned on; it works on no other. None for all other methods."""

    @classmethod
    def load(cls: type[Loaded], path: str | Path) -> Loaded:
        """The method of a file that `autoprune tune` wrote, with its budget.

        It is refused on another model than the one it was tuned on (`ModelIdentity`), when it is attached.
        A copy with settings of your own, `dataclasses.replace(method, ...)`, works on any.

        Raises:
            ValueError: there is no such file, it is damaged or of another release, or holds another method.
        """
        file = TunedFile.read(path)
        if file.method != cls.name:
            raise ValueError(
                f"{str(path)!r} holds the method {file.method}, and {cls.__name__} is {cls.name}; "
                "autoprune.load_method(path) loads whichever it is"
            )
        try:
            settings = {name: as_setting(value) for name, value in file.settings.items()}
            method = cls(budget=file.budget, **settings)  # type: ignore[call-arg]
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"the settings in {str(path)!r}, of autoprune {file.version}, are none of this release's "
                f"{cls.name}: {error}; tune again, or install the release that wrote them"
            ) from error
        vars(method)["tuned_for"] = file.model
        return method

    def __call__(
        self,
        model: torch.nn.Module,
        *,
        visual_mask: torch.Tensor | None = None,
        vision_scores: torch.Tensor | None = None,
        keep: int | None = None,
        on_sample: Callable[[Sample], object] | None = None,
    ) -> Attachment:
        """Prepare pruning of `model`; enter the result as a context manager to switch it on.

        Args:
            model: a vision-language model of transformers, in eval mode, or a pipeline that holds one.
            visual_mask: bool [batch, length], which positions of the prompt are visual. Only needed
                when the model is called with `inputs_embeds` instead of `input_ids`.
            vision_scores: float [batch, N] or [total visual tokens], scores to use instead of the
                vision tower's own.
            keep, on_sample: how many samples the trace keeps, and who is told of each; see `Trace`. A block
                keeps all.

        Raises:
            UnsupportedError: the model is no vision-language model this library can prune.
            ValueError: the method cannot work on this model, its budget is infeasible, or an argument is not
                what it should be.
        """
        # transformers takes seconds to import, and a schedule needs none of it.
        from ..engine.attach import Attachment

        attachment = Attachment(
            self,
            model,
            visual_mask=visual_mask,
            vision_scores=vision_scores,
            keep=keep,
            on_sample=on_sample,
        )
        if self.tuned_for is not None:
            self.tuned_for.check(attachment.model)
        return attachment

    def attach(
        self, model: torch.nn.Module, *, keep: int | None = KEPT_BY_A_HANDLE, **options: Any
    ) -> Attachment:
        """Switch pruning on until `detach()` is called on the returned handle.

        Args:
            model: as for a block (`__call__`).
            options: as for a block.
            keep: how many samples the handle's trace keeps, the last ones; None keeps all. Its summary
                counts every prompt.
        """
        return self(model, keep=keep, **options).attach()


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


def check_choice(method: Method, name: str, allowed: Sequence[Any]) -> None:
    """Raise ValueError for a setting that is none of the allowed values."""
    value = getattr(method, name)
    if value not in allowed:
        raise ValueError(f"{method.name}: {name} must be one of {tuple(allowed)}, got {value!r}")


def without_summary(counts: Sequence[int], seen: Observation, state: PromptState) -> list[int]:
    """How many tokens are kept as they are where so many enter: of a prompt that gets its summary, one less."""
    required = state.prompts.required or [0] * len(counts)
    prompts = zip(counts, seen.counts, state.prompts.num_visual, required, strict=True)
    return [n - (least < n < now == whole) for n, now, whole, least in prompts]


def refuse_summary(method: Planned) -> NoReturn:
    """A summary for a method that merges dropped tokens itself."""
    raise ValueError(
        f"{method.name} merges dropped tokens itself, so that nothing is left for a summary; merger must be "
        f"None, got {method.merger!r}"
    )


@dataclass(frozen=True)
class Planned(Method):
    """A method with a schedule of fixed shape, fitted to the budget: the nearest from below.

    Args:
        positions: "original" rotary positions, or "compacted" to 0, 1, 2, ... in every layer.
        merger: what becomes of dropped tokens: None leaves that to the method. "summary" lets one token stand
            for all of them, inside the budget, or in another form `SummaryToken(...)`. Not for methods that
            merge tokens themselves.

    merges: whether the method makes tokens of dropped ones itself.
    """

    looks: ClassVar[Needs] = Needs()
    sees: ClassVar[Tower] = Tower()
    merges: ClassVar[bool] = False

    budget: AnyBudget = AnyBudget(64)
    positions: Positions = field(default="original", kw_only=True)
    merger: str | SummaryToken | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        check_settings(self)
        check_choice(self, "positions", POSITIONS)
        if as_summary(self.merger) is not None and self.merges:
            refuse_summary(self)

    @abc.abstractmethod
    def shape(self, setting: int, num_visual: int, num_layers: int) -> list[int]:
        """Visual tokens entering each layer, at a setting of the schedule's free number.

        In no layer does it fall as the setting rises; at the last setting nothing is pruned.
        """

    def settings(self, num_visual: int, num_layers: int) -> range:
        """The settings of `shape`, from the cheapest to the costliest: by default a count of tokens."""
        return range(1, num_visual + 1)

    def plan(
        self, num_layers: int, num_visual: int, num_text: int = 0, cost: DecoderCost | None = None
    ) -> list[int]:
        """The schedule n_0..n_{L-1} of one prompt, without a model.

        Args:
            num_layers: L.
            num_visual: N.
            num_text: other tokens of the prompt; matters for FLOPs and KV budgets only.
            cost: the decoder's cost, for FLOPs and KV budgets.

        Raises:
            InfeasibleBudget: the budget cannot be met; the message names the smallest that can.
            ValueError: a size that is no whole number or too small.
        """
        check_size(num_layers, num_visual, num_text)
        if not num_visual:
            return [0] * num_layers
        return self._fit(0, num_layers, num_visual, num_text, cost)

    def _fit(
        self,
        least: int,
        num_layers: int,
        num_visual: int,
        num_text: int,
        cost: DecoderCost | None,
    ) -> list[int]:
        """The costliest schedule within the budget, with `least` tokens or more in every layer."""
        return fit_schedule(
            lambda setting: [max(n, least) for n in self.shape(setting, num_visual, num_layers)],
            self.settings(num_visual, num_layers),
            num_visual,
            self.budget,
            cost,
            num_text,
        )

    def capacity(
        self, num_layers: int, num_visual: int, num_text: int = 0, cost: DecoderCost | None = None
    ) -> list[int]:
        return self.plan(num_layers, num_visual, num_text, cost)

    def tower(self) -> Tower:
        return self.sees

    def begin(self, state: PromptState) -> None:
        visual, text = state.prompts.num_visual, state.prompts.num_text
        required = state.prompts.required or [0] * len(visual)
        prompts = list(zip(visual, text, required, strict=True))
        plans = {prompt: self._plan(state.shape, *prompt) for prompt in set(prompts)}
        state.schedule = [plans[prompt] for prompt in prompts]

    def _plan(self, shape: ModelShape, num_visual: int, num_text: int, required: int) -> list[int]:
        """`plan`, where so many tokens stay in every layer (`Prompts.required`)."""
        plan = self.plan(shape.num_layers, num_visual, num_text, shape.cost)
        if min(plan) >= required:
            return plan
        return self._fit(required, shape.num_layers, num_visual, num_text, shape.cost)

    def needs(self, cut: int, state: PromptState) -> Needs | None:
        assert state.schedule is not None
        before = [plan[cut - 1] for plan in state.schedule] if cut else state.prompts.num_visual
        due = any(plan[cut] < count for plan, count in zip(state.schedule, before, strict=True))
        return self.looks if due else None

    def select(self, seen: Observation, state: PromptState) -> Selection | None:
        assert state.schedule is not None
        counts = [plan[seen.cut] for plan in state.schedule]
        if self.summary is not None:
            counts = without_summary(counts, seen, state)
        return self.choose(seen, counts, state)

    @property
    def summary(self) -> SummaryToken | None:
        return as_summary(self.merger)

    def choose(self, seen: Observation, counts: Sequence[int], state: PromptState) -> Selection:
        """Which tokens stay; `counts` [batch] is how many of each prompt."""
        scores = required_first(self.score(seen, state), seen)
        return Selection(top_k(scores, counts, seen.mask), list(counts))

    def score(self, seen: Observation, state: PromptState) -> torch.Tensor:
        """How much each visual token matters, [batch, V]; the best are kept."""
        raise NotImplementedError(f"{type(self).__name__} defines neither score nor choose")


@dataclass(frozen=True)
class PreDecoder(Planned):
    """One cut before the decoder: every layer sees the same tokens."""

    def shape(self, setting: int, num_visual: int, num_layers: int) -> list[int]:
        return [setting] * num_layers


@dataclass(frozen=True)
class TowerScored(PreDecoder):
    """One cut before the decoder, by what the vision tower shows of each token.

    Args:
        mask_padding: patches that hold nothing but the padding of a square-padded picture are kept last;
            False treats them as any other.
    """

    mask_padding: bool = field(default=True, kw_only=True)

    def select(self, seen: Observation, state: PromptState) -> Selection | None:
        if not self.mask_padding:
            seen = replace(seen, vision_padding=None)
        return super().select(seen, state)


@dataclass(frozen=True)
class Ordered(TowerScored):
    """Tokens are handed to the decoder in another order than the picture's, if so wished.

    Args:
        order: "picture", or "released" for the order of the authors' code, with compacted positions.
    """

    order: str = field(default="picture", kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice(self, "order", ("picture", "released"))
        if self.order == "released" and self.positions != "compacted":
            raise ValueError(
                f"{self.name}: order='released' moves tokens to places of others, but positions is "
                f"{self.positions!r}; use positions='compacted'"
            )

    def ordered(self, selection: Selection, rank: torch.Tensor) -> Selection:
        """A selection with states, in the order of `rank` [batch, V] where that is wished."""
        if self.order == "picture":
            return selection
        assert selection.states is not None
        states, sizes = in_order(selection.states, selection.kept, rank), selection.sizes
        if sizes is not None:
            sizes = in_order(sizes[..., None], selection.kept, rank)[..., 0]
        return replace(selection, states=states, sizes=sizes)


@dataclass(frozen=True)
class AfterLayer(Planned):
    """One cut before decoder layer `layer`, stated for 32 layers and rescaled to the model's depth."""

    layer: float = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.layer < 32:
            raise ValueError(
                f"layer must be above 0 and below 32 (it is stated for 32 layers), got {self.layer!r}"
            )

    def shape(self, setting: int, num_visual: int, num_layers: int) -> list[int]:
        cut = at_depth(self.layer, num_layers)
        return schedule_from_cuts(num_visual, num_layers, [cut], [setting])
