"""A method made of methods: one for each prompt of a batch."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from functools import partial
from typing import Any, ClassVar

import torch

from ..budget import Budget
from ..cost import DecoderCost
from ..method import (
    Merged,
    Method,
    ModelShape,
    Needs,
    Observation,
    Patches,
    Positions,
    PromptState,
    Rows,
    Selection,
    Tower,
)
from ..transfer import to_device

# What a method must have asked of the tower to be shown a field of `Observation`.
ASKED: dict[str, Callable[[Tower], bool]] = {
    "vision_scores": lambda tower: tower.attention,
    "vision_padding": lambda tower: tower.attention,
    "vision_keys": lambda tower: tower.keys,
    "vision_received": lambda tower: tower.received,
    "vision_middle": lambda tower: tower.middle is not None,
    "places": lambda tower: tower.places,
    "vision_groups": lambda tower: tower.merge,
}
# Fields of `Observation` that have text rows in the place of visual tokens, or the tokens before the last
# dimension, and those that come of keys.
OF_TEXT = ("text_mask", "text_hidden", "text_keys")
BEFORE_LAST = ("hidden", "keys", "queries")
OF_KEYS = ("keys", "text_keys", "queries")


def per_prompt(methods: Sequence[Method | None]) -> PerPrompt:
    """One method for each prompt of a batch, so that requests with different settings share a forward.

    `with autoprune.per_prompt([AutoPrune(16), FastV(48), None])(model) as trace:` prunes the first prompt
    by AutoPrune, the second by FastV, and leaves the third whole. A prompt keeps what it keeps alone, under
    its own method and budget. The list is for batches of its length; `generate` may repeat prompts (beams,
    several answers).

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
        budgets = [Budget.of(method.budget) for method in different] or [Budget.ratio(1)]
        # A budget that pays for text too says that there is less room the more text there is.
        priced = [budget for budget in budgets if budget.kind in ("flops", "kv_bytes")]
        object.__setattr__(self, "budget", (priced or budgets)[0])
        _check_positions(different)
        positions = different[0].positions if different else "original"
        object.__setattr__(self, "positions", positions)
        self.tower()

    @property
    def _different(self) -> list[Method]:
        """The methods, without those that are equal to an earlier one."""
        return _unequal([method for method in self.methods if method is not None])

    def tower(self) -> Tower:
        towers = [method.tower() for method in self._different]
        middles = {tower.middle for tower in towers} - {None}
        if len(middles) > 1:
            raise ValueError(
                f"the methods look at different blocks in the middle of the vision tower ({sorted(middles)}), "
                "and one forward shows one; give them the same one, or run them in batches of their own"
            )
        return Tower(
            attention=any(tower.attention for tower in towers),
            keys=any(tower.keys for tower in towers),
            received=any(tower.received for tower in towers),
            middle=next(iter(middles), None),
            places=any(tower.places for tower in towers),
            merge=self._merges_in_the_tower,
        )

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

    def begin(self, state: PromptState) -> None:
        state.notes["parts"] = parts = self._parts(state)
        for part in parts:
            if part.method is not None:
                part.method.begin(part.state)
        _report(parts, state)

    def _parts(self, state: PromptState) -> list[_Part]:
        """The prompts, by method."""
        prompts, repeats = state.prompts, state.prompts.repeats
        if len(prompts) != repeats * len(self.methods):
            raise ValueError(
                f"per_prompt was given {len(self.methods)} methods, but the batch has "
                f"{len(prompts) // repeats} prompts; give one method for each prompt, in their order (None "
                "leaves a prompt whole)"
            )
        methods = [method for method in self.methods for _ in range(repeats)]
        parts: list[_Part] = []
        for method in [*self._different, None]:
            rows = [i for i, of_prompt in enumerate(methods) if _equal(of_prompt, method)]
            if len(rows) == len(prompts):
                return [_Part(method, rows, state)]
            if rows:
                own = PromptState(state.shape, prompts.of(rows))
                # Alone, prompts without a picture are not pruned at all.
                has_pictures = any(own.prompts.num_visual)
                parts.append(_Part(method if has_pictures else None, rows, own))
        return parts

    def needs(self, cut: int, state: PromptState) -> Needs | None:
        parts: list[_Part] = state.notes["parts"]
        for part in parts:
            part.needs = None if part.method is None else part.method.needs(cut, part.state)
        _report(parts, state)
        return _union([part.needs for part in parts if part.needs is not None])

    def select(self, seen: Observation, state: PromptState) -> Selection | None:
        parts: list[_Part] = state.notes["parts"]
        if len(parts) == 1:
            (part,) = parts
            return None if part.method is None else part.method.select(seen, state)
        looks = _looks(seen, [part.needs for part in parts if part.needs is not None])
        for part in parts:
            part.selection = None
            part.counts = [seen.counts[row] for row in part.rows]
            if part.method is None or part.needs is None:
                continue
            own = part.shown(looks[_look(part.needs)])
            selection = part.method.select(own, part.state)
            if selection is None or (
                selection.merged is None and list(selection.counts) == part.counts
            ):
                continue
            part.selection, part.counts = selection, list(selection.counts)
        _report(parts, state)
        return _join(next(iter(looks.values())), parts)


@dataclass
class _Part:
    """The prompts of a batch that have equal methods, in one prefill.

    method: None leaves them whole.
    rows: which prompts they are.
    state: what `method` carries from cut to cut.
    needs: what it must see at the next cut.
    selection, counts: its decision of the last cut, and how many of the tokens before it stay.
    """

    method: Method | None
    rows: list[int]
    state: PromptState
    needs: Needs | None = None
    selection: Selection | None = None
    counts: list[int] = field(default_factory=list)
    _index: torch.Tensor | None = None

    def index(self, device: torch.device) -> slice | torch.Tensor:
        """Where its prompts are in the batch."""
        first, behind = self.rows[0], self.rows[-1] + 1
        if behind - first == len(self.rows):
            return slice(first, behind)
        if self._index is None or self._index.device != device:
            self._index = to_device(self.rows, device)
        return self._index

    def of(self, values: torch.Tensor) -> torch.Tensor:
        """Its prompts of [batch, ...]."""
        return values[self.index(values.device)]

    def shown(self, seen: Observation) -> Observation:
        """What the method would be shown of its prompts alone."""
        assert self.method is not None and self.needs is not None
        needs, tower, width = self.needs, self.method.tower(), max(self.counts)
        own: dict[str, Any] = {"cut": seen.cut, "counts": list(self.counts)}
        own["no_padding"] = seen.no_padding
        for name in (f.name for f in fields(Observation) if f.name not in own):
            values = getattr(seen, name)
            if isinstance(values, torch.Tensor):
                asked = ASKED.get(name)
                if asked is None or (needs.vision and asked(tower)):
                    own[name] = self._cut_from(name, self.of(values), width)
            elif callable(values) and (needs.keys if name in OF_KEYS else needs.hidden):
                own[name] = partial(self._given, name, values, width)
        return Observation(**own)

    def _given(self, name: str, give: Callable[[], torch.Tensor], width: int) -> torch.Tensor:
        return self._cut_from(name, self.of(give()), width)

    @staticmethod
    def _cut_from(name: str, values: torch.Tensor, width: int) -> torch.Tensor:
        """A field of `Observation` without the visual tokens that only other prompts have."""
        if name in OF_TEXT:
            return values
        if name == "attention":
            return values[..., :width]
        return values[..., :width, :] if name in BEFORE_LAST else values[:, :width]


def _union(wanted: Sequence[Needs]) -> Needs | None:
    """What shows every method what it needs."""
    if not wanted:
        return None
    union, hidden = None, any(needs.hidden for needs in wanted)
    for look in dict.fromkeys(_look(needs) for needs in wanted):
        own = [needs for needs in wanted if _look(needs) == look]
        union = Needs(
            *look,
            keys=any(needs.keys for needs in own),
            vision=any(needs.vision for needs in own),
            hidden=hidden,
            beside=union,
        )
    return union


def _look(needs: Needs) -> tuple[Rows | None, bool]:
    """What tells one look at the prompts from another: the rows, and the layer."""
    return needs.rows, needs.ahead


def _looks(
    seen: Observation, wanted: Sequence[Needs]
) -> dict[tuple[Rows | None, bool], Observation]:
    """What was seen of each look that `_union` asked for, the first one first."""
    union, looks = _union(wanted), {}
    for needs in union.each() if union is not None else ():
        looks[_look(needs)] = _read_once(seen)
        seen = seen.beside or seen
    return looks


def _read_once(seen: Observation) -> Observation:
    """The same, where what is gathered on demand is gathered for the first that asks."""
    given = {f.name: getattr(seen, f.name) for f in fields(seen)}
    once = {name: functools.cache(give) for name, give in given.items() if callable(give)}
    return replace(seen, **once)


def _join(seen: Observation, parts: Sequence[_Part]) -> Selection | None:
    """One decision for the whole batch."""
    if all(part.selection is None for part in parts):
        return None
    counts = [0] * len(seen.counts)
    for part in parts:
        for row, count in zip(part.rows, part.counts, strict=True):
            counts[row] = count
    width = max(counts)
    every = torch.arange(width, device=seen.mask.device)
    kept = torch.where(seen.mask[:, :width], every, -1)
    for part in parts:
        if part.selection is not None:
            own = part.selection.kept[:, : max(part.counts)]
            rows = part.index(kept.device)
            kept[rows] = -1
            kept[rows, : own.shape[1]] = own.to(kept.device)
    merged = _join_merged(seen, parts)
    return Selection(kept, counts, merged, _join_states(seen, parts, kept, counts, merged))


def _join_merged(seen: Observation, parts: Sequence[_Part]) -> Merged | None:
    """The tokens that some of the methods made."""
    made = [
        (part, part.selection.merged)
        for part in parts
        if part.selection is not None and part.selection.merged is not None
    ]
    if not made:
        return None
    like, device = made[0][1].hidden, seen.mask.device
    number = max(merged.hidden.shape[1] for _, merged in made)
    hidden = like.new_zeros(len(seen.counts), number, like.shape[2])
    # The place of the last visual token is as good as none: what is made goes behind what is kept.
    last = to_device([max(count - 1, 0) for count in seen.counts], device)
    place, counts = last[:, None].repeat(1, number), [0] * len(seen.counts)
    for part, merged in made:
        own = slice(merged.hidden.shape[1])
        hidden[part.index(hidden.device), own] = merged.hidden.to(hidden)
        if merged.place is not None:
            place[part.index(device), own] = merged.place.to(device)
        for row, count in zip(part.rows, merged.counts, strict=True):
            counts[row] = count
    return Merged(hidden, counts, place)


def _join_states(
    seen: Observation,
    parts: Sequence[_Part],
    kept: torch.Tensor,
    counts: Sequence[int],
    merged: Merged | None,
) -> torch.Tensor | None:
    """The states of all tokens that are left, if a method changed those of its own."""
    changed = [
        (part, part.selection.states)
        for part in parts
        if part.selection is not None and part.selection.states is not None
    ]
    if not changed:
        return None
    assert seen.hidden is not None
    hidden = seen.hidden()
    position = kept.to(hidden.device)
    states = _at(hidden, position)
    if merged is not None and merged.place is not None:
        states = _in_order(states, position, counts, merged)
    for part, own in changed:
        own = own[:, : max(part.counts)].to(states)
        states[part.index(states.device), : own.shape[1]] = own
    return states


def _at(hidden: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
    """[batch, V, size] at positions [batch, K]; anything at -1."""
    index = position.clamp(min=0)[..., None].expand(-1, -1, hidden.shape[2])
    return hidden.gather(1, index)


def _in_order(
    states: torch.Tensor, kept: torch.Tensor, counts: Sequence[int], merged: Merged
) -> torch.Tensor:
    """States of kept and merged tokens in the order in which they stand."""
    assert merged.place is not None
    device, behind = states.device, torch.iinfo(torch.long).max
    number = torch.arange(merged.hidden.shape[1], device=device)
    real = number < to_device(list(merged.counts), device)[:, None]
    place = merged.place.to(device)
    key = torch.cat([kept.masked_fill(kept < 0, behind), place.masked_fill(~real, behind)], dim=1)
    total = [a + b for a, b in zip(counts, merged.counts, strict=True)]
    order = key.argsort(dim=1, stable=True)[:, : max(total)]
    return _at(torch.cat([states, merged.hidden.to(states)], dim=1), order)


def _report(parts: Sequence[_Part], state: PromptState) -> None:
    """Put what the methods planned and measured where the trace finds it, prompt by prompt."""
    if len(parts) == 1 and parts[0].method is not None:
        return
    layers = state.shape.num_layers
    for part in parts:
        if part.method is None:
            part.state.schedule = [[n] * layers for n in part.state.prompts.num_visual]
    state.schedule = _by_prompt(parts, [part.state.schedule for part in parts])
    information = [part.state.mutual_information for part in parts]
    state.mutual_information = _by_prompt(parts, information)


def _by_prompt(parts: Sequence[_Part], values: Sequence[list[Any] | None]) -> list[Any] | None:
    """One entry for each prompt, None where its method has none; None if no method has any."""
    if all(own is None for own in values):
        return None
    whole: list[Any] = [None] * sum(len(part.rows) for part in parts)
    for part, own in zip(parts, values, strict=True):
        for i, row in enumerate(part.rows):
            whole[row] = None if own is None else own[i]
    return whole


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
