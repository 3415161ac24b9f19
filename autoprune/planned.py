"""Methods whose schedule is known before the prompt is read: all but the adaptive ones.

Such a method is a shape of schedule, a cut or a few, and a rule for each cut. Derive from
`PreDecoder` (one cut before the decoder), `TowerScored` (the same, by what the vision tower shows),
`AfterLayer` (one cut between two layers) or `Planned`, and write `score` (the best are kept) or `choose`
(anything else).
"""

from __future__ import annotations

import abc
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch

from .budget import Budget
from .cost import DecoderCost
from .mergers import in_order
from .method import (
    POSITIONS,
    Method,
    ModelShape,
    Needs,
    Observation,
    Positions,
    PromptState,
    Selection,
    Tower,
    check_choice,
    check_settings,
)
from .schedules import at_depth, check_size, fit_schedule, staircase
from .selectors import required_first, top_k


@dataclass(frozen=True)
class Planned(Method):
    """A method with a schedule of fixed shape, fitted to the budget: the nearest from below.

    Args:
        positions: "original" rotary positions, or "compacted" to 0, 1, 2, ... in every layer.
    """

    looks: ClassVar[Needs] = Needs()
    sees: ClassVar[Tower] = Tower()

    budget: Budget | float = 64
    positions: Positions = field(default="original", kw_only=True)

    def __post_init__(self) -> None:
        object.__setattr__(self, "budget", Budget.of(self.budget))
        check_settings(self)
        check_choice(self, "positions", POSITIONS)

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
        assert isinstance(self.budget, Budget)
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
        return self.choose(seen, [plan[seen.cut] for plan in state.schedule], state)

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
        return replace(selection, states=in_order(selection.states, selection.kept, rank))


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
        return staircase(num_visual, num_layers, [cut], [setting])
