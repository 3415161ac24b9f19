"""A method made of methods: one for each prompt of a batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any, ClassVar

import torch

from ..contract import (
    ModelShape,
    Needs,
    Observation,
    Patches,
    Positions,
    PromptState,
    Ranking,
    Selection,
    SummaryToken,
    Tower,
)
from ..policy.budget import Budget, InfeasibleBudget
from ..policy.cost import DecoderCost
from .base import Method
from .side_by_side import Part, join, look_of, looks_of, report, union_of, union_of_towers


def per_prompt(methods: Sequence[Method | None]) -> PerPrompt:
    """One method for each prompt of a batch, so that requests with different settings share a forward.

    `with autoprune.per_prompt([AutoPrune(16), FastV(48), None])(model) as trace:` prunes the first prompt
    by AutoPrune, the second by FastV, and leaves the third whole. A prompt keeps what it keeps alone, under
    its own method and budget; a budget over a batch is shared by the prompts of equal methods. The list is for
    batches of its length; `generate` may repeat prompts (beams, several answers).

    Args:
        methods: a method for each prompt, in the batch's order; None leaves a prompt whole.

    Raises:
        ValueError: the methods cannot run side by side, or something else was given.
    """
    return PerPrompt(methods)  # type: ignore[arg-type]


@dataclass(frozen=True)
class PerPrompt(Method):
    """What `per_prompt` makes: the prompts of equal methods go together, as a batch of that method.

    A method is shown what it would be shown of its prompts alone. Patches are merged inside the vision tower
    only if all prompts have one method that does so, with whatever budgets: the tower's share of
    tokens is the same for all pictures of a batch then (see `ToMe`). Beside other methods the merges follow
    at the tower's end.

    Args:
        methods: as for `per_prompt`.
    """

    name: ClassVar[str] = "per_prompt"
    paper: ClassVar[str] = "none: a batch of several methods"

    methods: tuple[Method | None, ...]
    budget: Budget = field(init=False, repr=False, compare=False)
    positions: Positions = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        _check_methods(self.methods)
        object.__setattr__(self, "methods", tuple(self.methods))
        different = self._different
        budgets = [method.budget for method in different] or [Budget.ratio(1)]
        # A budget that pays for text too says that there is less room the more text there is.
        priced = [budget for budget in budgets if budget.kind in ("flops", "kv_bytes")]
        object.__setattr__(self, "budget", (priced or budgets)[0])
        _check_positions(different)
        positions = different[0].positions if different else "original"
        object.__setattr__(self, "positions", positions)
        _check_summaries(different)
        self.tower()

    @property
    def _different(self) -> list[Method]:
        """The methods, without those that are equal to an earlier one."""
        return _unequal([method for method in self.methods if method is not None])

    def tower(self) -> Tower:
        towers = [method.tower() for method in self._different]
        union = union_of_towers(towers)
        if union is None:
            middles = sorted({tower.middle for tower in towers if tower.middle is not None})
            raise ValueError(
                f"the methods look at different blocks in the middle of the vision tower ({middles}), "
                "and one forward shows one; give them the same one, or run them in batches of their own"
            )
        return replace(union, merge=self._merges_in_the_tower)

    @property
    def _merges_in_the_tower(self) -> bool:
        """Whether one rule merges the patches of all prompts: the methods differ in their budgets only."""
        first, others = self._different[:1], self._different[1:]
        if None in self.methods or not first or not first[0].tower().merge:
            return False
        return all(_but_for_budget(first[0], other) for other in others)

    def merge(self, seen: Patches, leaving: int) -> torch.Tensor:
        return self._different[0].merge(seen, leaving)

    def check(self, shape: ModelShape) -> None:
        for method in self._different:
            method.check(shape)

    def capacity(
        self, num_layers: int, num_visual: int, num_text: int = 0, cost: DecoderCost | None = None
    ) -> list[int]:
        rooms = [m.capacity(num_layers, num_visual, num_text, cost) for m in self._different]
        if None in self.methods:
            rooms.append([num_visual] * num_layers)
        return [max(layer) for layer in zip(*rooms, strict=True)]

    @property
    def summary(self) -> SummaryToken | None:
        return self._different[0].summary if self._different else None

    @property
    def needs_speed(self) -> bool:
        return any(method.needs_speed for method in self._different)

    def begin(self, state: PromptState) -> None:
        state.notes["parts"] = parts = self._parts(state)
        for part in parts:
            _begin(part)
        report(parts, state)

    def _parts(self, state: PromptState) -> list[Part]:
        """The prompts, by method."""
        prompts, repeats = state.prompts, state.prompts.repeats
        if len(prompts) != repeats * len(self.methods):
            raise ValueError(
                f"per_prompt was given {len(self.methods)} methods, but the batch has "
                f"{len(prompts) // repeats} prompts; give one method for each prompt, in their order (None "
                "leaves a prompt whole)"
            )
        methods = [method for method in self.methods for _ in range(repeats)]
        parts: list[Part] = []
        for method in [*self._different, None]:
            chosen = [i for i, of_prompt in enumerate(methods) if _equal(of_prompt, method)]
            if len(chosen) == len(prompts):
                return [Part(method, chosen, state)]
            if chosen:
                own = PromptState(state.shape, prompts.of(chosen))
                # Alone, prompts without a picture are not pruned at all.
                has_pictures = any(own.prompts.num_visual)
                parts.append(Part(method if has_pictures else None, chosen, own))
        return parts

    def needs(self, cut: int, state: PromptState) -> Needs | None:
        parts: list[Part] = state.notes["parts"]
        for part in parts:
            part.needs = part.needs_at(cut)
        report(parts, state)
        return union_of([part.needs for part in parts if part.needs is not None])

    def select(self, seen: Observation, state: PromptState) -> Selection | Ranking | None:
        parts: list[Part] = state.notes["parts"]
        if len(parts) == 1:
            (part,) = parts
            return None if part.method is None else part.method.select(seen, state)
        looks = looks_of(seen, [part.needs for part in parts if part.needs is not None])
        for part in parts:
            part.selection = None
            part.counts = [seen.counts[prompt] for prompt in part.prompts]
            if part.method is None or part.needs is None:
                continue
            own = part.shown(looks[look_of(part.needs)])
            selection = part.decide(own)
            if selection is None or (
                selection.merged is None and list(selection.counts) == part.counts
            ):
                continue
            part.selection, part.counts = selection, list(selection.counts)
        report(parts, state)
        return join(next(iter(looks.values())), parts)

    def end(self, state: PromptState, done: bool) -> None:
        for part in state.notes["parts"]:
            if part.method is not None:
                part.method.end(part.state, done)


def _begin(part: Part) -> None:
    """Raise InfeasibleBudget that says of which prompts."""
    if part.method is None:
        return
    try:
        part.method.begin(part.state)
    except InfeasibleBudget as refused:
        said = f"{part.method.name} cannot prune prompt {part.names} of the batch: {refused}"
        raise InfeasibleBudget(said, refused.asked, refused.smallest) from None


def _equal(method: Method | None, other: Method | None) -> bool:
    return method is other or (type(method) is type(other) and method == other)


def _unequal(methods: Sequence[Method]) -> list[Method]:
    """Without those that are equal to an earlier one. A method need not be hashable."""
    different: list[Method] = []
    for method in methods:
        if not any(_equal(method, other) for other in different):
            different.append(method)
    return different


def _but_for_budget(method: Method, other: Method) -> bool:
    """Whether two methods are equal but for what they may spend."""
    if type(method) is not type(other) or not is_dataclass(method):
        return False
    names = [setting.name for setting in fields(method) if setting.name != "budget"]
    return all(getattr(method, name) == getattr(other, name) for name in names)


def _check_positions(methods: Sequence[Method]) -> None:
    """Raise ValueError unless all number positions in the same way: one forward has one way."""
    if len({method.positions for method in methods}) > 1:
        listed = ", ".join(f"{method.name} {method.positions!r}" for method in methods)
        raise ValueError(
            f"the methods of a batch must agree in their positions, and these do not ({listed}); give them "
            "the same, or run them in batches of their own"
        )


def _check_summaries(methods: Sequence[Method]) -> None:
    """Raise ValueError unless all have the same summary of dropped tokens, or none."""
    if any(method.summary != methods[0].summary for method in methods):
        listed = ", ".join(f"{method.name} {method.summary}" for method in methods)
        raise ValueError(
            f"the methods of a batch must agree in their summary token, and these do not ({listed}); give them "
            "the same merger, or run them in batches of their own"
        )


def _check_methods(methods: Any) -> None:
    """Raise ValueError unless this is a list of methods and Nones."""
    if not isinstance(methods, (list, tuple)) or not methods:
        raise ValueError(
            f"per_prompt takes a list with one method for each prompt of the batch, got {methods!r}"
        )
    for method in methods:
        if isinstance(method, PerPrompt):
            raise ValueError(
                "per_prompt takes the method of a single prompt, got another per_prompt"
            )
        if method is not None and not isinstance(method, Method):
            raise ValueError(
                f"per_prompt takes methods, or None for a prompt that is left whole, got {method!r}; for "
                "budgets, AutoPrune.per_prompt([16, 48])"
            )
