"""What each of several methods is shown of one batch, and their decisions put together."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from typing import Any

import torch

from ..contract import Merged, Needs, Observation, PromptState, Ranking, Rows, Selection, Tower
from ..parts.gather import tokens_at
from ..parts.selectors import required_first, top_k
from ..parts.transfer import to_device
from .base import Method, without_summary

# What a method must have asked of the tower to be shown a field of `Observation`.
ASKED: dict[str, Callable[[Tower], bool]] = {
    "vision_scores": lambda tower: tower.attention,
    "vision_padding": lambda tower: tower.attention or tower.received,
    "vision_outside": lambda tower: tower.outside,
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


@dataclass
class Part:
    """The prompts of a batch that have equal methods, in one prefill.

    method: None leaves them whole.
    prompts: which of the batch they are.
    state: what `method` carries from cut to cut.
    needs: what it must see at the next cut.
    selection, counts: its decision of the last cut, and how many of the tokens before it stay.
    ranking: from which its cuts follow, with scores of the tokens that are left.
    """

    method: Method | None
    prompts: list[int]
    state: PromptState
    needs: Needs | None = None
    selection: Selection | None = None
    counts: list[int] = field(default_factory=list)
    ranking: Ranking | None = None
    _index: torch.Tensor | None = None

    def needs_at(self, cut: int) -> Needs | None:
        """What the method must see at a cut; nothing of it where the cut follows from a ranking."""
        if self.method is None:
            return None
        needs, ranking = self.method.needs(cut, self.state), self.ranking
        if needs is None and ranking is not None and cut < ranking.until:
            assert self.state.schedule is not None
            falls = any(plan[cut] < plan[cut - 1] for plan in self.state.schedule)
            return Needs() if falls else None
        return needs

    def decide(self, seen: Observation) -> Selection | None:
        """The method's decision of one cut, of which `seen` shows its own prompts."""
        assert self.method is not None
        if self.ranking is None or seen.cut >= self.ranking.until:
            answer = self.method.select(seen, self.state)
            if not isinstance(answer, Ranking):
                return answer
            # By the visual tokens of the prompt, of which those that are left may not be known here.
            number = max(self.state.prompts.num_visual)
            every = answer.scores.new_zeros(len(answer.scores), number + 1)
            place = seen.index.where(seen.mask, number)
            self.ranking = replace(answer, scores=every.scatter_(1, place, answer.scores))
        assert self.state.schedule is not None
        scores = self.ranking.scores.gather(1, seen.index.clamp(min=0))
        counts = [
            max(plan[seen.cut], least)
            for plan, least in zip(self.state.schedule, self._required(), strict=True)
        ]
        if self.method.summary is not None:
            counts = without_summary(counts, seen, self.state)
        return Selection(top_k(required_first(scores, seen), counts, seen.mask), counts)

    def _required(self) -> Sequence[int]:
        return self.state.prompts.required or [0] * len(self.prompts)

    @property
    def names(self) -> str:
        """Its prompts for a reader, counted from 0."""
        return ", ".join(map(str, self.prompts))

    def index(self, device: torch.device) -> slice | torch.Tensor:
        """Where its prompts are in the batch."""
        first, behind = self.prompts[0], self.prompts[-1] + 1
        if behind - first == len(self.prompts):
            return slice(first, behind)
        if self._index is None or self._index.device != device:
            self._index = to_device(self.prompts, device)
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


def union_of(wanted: Sequence[Needs]) -> Needs | None:
    """What shows every method what it needs."""
    if not wanted:
        return None
    union, hidden = None, any(needs.hidden for needs in wanted)
    for look in dict.fromkeys(look_of(needs) for needs in wanted):
        own = [needs for needs in wanted if look_of(needs) == look]
        union = Needs(
            *look,
            keys=any(needs.keys for needs in own),
            vision=any(needs.vision for needs in own),
            hidden=hidden,
            beside=union,
        )
    return union


def union_of_towers(wanted: Sequence[Tower]) -> Tower | None:
    """What shows every method what it needs of the vision tower, with nothing merged there.

    None if they look at different blocks in its middle: one forward shows one.
    """
    middles = {tower.middle for tower in wanted if tower.middle is not None}
    if len(middles) > 1:
        return None
    return Tower(
        attention=any(tower.attention for tower in wanted),
        keys=any(tower.keys for tower in wanted),
        received=any(tower.received for tower in wanted),
        middle=next(iter(middles), None),
        places=any(tower.places for tower in wanted),
        outside=any(tower.outside for tower in wanted),
    )


def look_of(needs: Needs) -> tuple[Rows | None, bool]:
    """What tells one look at the prompts from another: the rows, and the layer."""
    return needs.rows, needs.ahead


def looks_of(
    seen: Observation, wanted: Sequence[Needs]
) -> dict[tuple[Rows | None, bool], Observation]:
    """What was seen of each look that `union_of` asked for, the first one first."""
    union, looks = union_of(wanted), {}
    for needs in union.each() if union is not None else ():
        looks[look_of(needs)] = _read_once(seen)
        seen = seen.beside or seen
    return looks


def _read_once(seen: Observation) -> Observation:
    """The same, where what is gathered on demand is gathered for the first that asks."""
    given = {f.name: getattr(seen, f.name) for f in fields(seen)}
    once: dict[str, Any] = {
        name: functools.cache(give) for name, give in given.items() if callable(give)
    }
    return replace(seen, **once)


def join(seen: Observation, parts: Sequence[Part]) -> Selection | None:
    """One decision for the whole batch."""
    if all(part.selection is None for part in parts):
        return None
    counts = [0] * len(seen.counts)
    for part in parts:
        for prompt, count in zip(part.prompts, part.counts, strict=True):
            counts[prompt] = count
    width = max(counts)
    every = torch.arange(width, device=seen.mask.device)
    kept = torch.where(seen.mask[:, :width], every, -1)
    for part in parts:
        if part.selection is not None:
            own = part.selection.kept[:, : max(part.counts)]
            index = part.index(kept.device)
            kept[index] = -1
            kept[index, : own.shape[1]] = own.to(kept.device)
    merged = _join_merged(seen, parts)
    states = _join_states(seen, parts, kept, counts, merged)
    return Selection(kept, counts, merged, states, _join_sizes(seen, parts, kept))


def _join_sizes(
    seen: Observation, parts: Sequence[Part], kept: torch.Tensor
) -> torch.Tensor | None:
    """The sizes of the kept tokens, if a method gives some; the others' stay what they are."""
    given = [
        (part, part.selection.sizes)
        for part in parts
        if part.selection is not None and part.selection.sizes is not None
    ]
    if not given:
        return None
    sizes = torch.ones(kept.shape, device=kept.device)
    if seen.sizes is not None:
        sizes = seen.sizes.to(sizes).gather(1, kept.clamp(min=0))
    for part, own in given:
        own = own[:, : max(part.counts)]
        sizes[part.index(sizes.device), : own.shape[1]] = own.to(sizes)
    return sizes


def _join_merged(seen: Observation, parts: Sequence[Part]) -> Merged | None:
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
    sizes = None
    if any(merged.sizes is not None for _, merged in made):
        sizes = torch.ones(place.shape, device=device)
    for part, merged in made:
        own = slice(merged.hidden.shape[1])
        hidden[part.index(hidden.device), own] = merged.hidden.to(hidden)
        if merged.place is not None:
            place[part.index(device), own] = merged.place.to(device)
        if sizes is not None and merged.sizes is not None:
            sizes[part.index(device), own] = merged.sizes.to(sizes)
        for prompt, count in zip(part.prompts, merged.counts, strict=True):
            counts[prompt] = count
    return Merged(hidden, counts, place, sizes)


def _join_states(
    seen: Observation,
    parts: Sequence[Part],
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
    states = tokens_at(hidden, position.clamp(min=0))
    if merged is not None and merged.place is not None:
        states = _in_order(states, position, counts, merged, seen.required)
    for part, own in changed:
        own = own[:, : max(part.counts)].to(states)
        states[part.index(states.device), : own.shape[1]] = own
    return states


def _in_order(
    states: torch.Tensor,
    kept: torch.Tensor,
    counts: Sequence[int],
    merged: Merged,
    required: torch.Tensor | None,
) -> torch.Tensor:
    """States of kept and merged tokens in the order in which they stand.

    required: as `Observation.required`; such a token stays the last, behind merged ones.
    """
    assert merged.place is not None
    device, behind = states.device, torch.iinfo(torch.long).max
    number = torch.arange(merged.hidden.shape[1], device=device)
    real = number < to_device(list(merged.counts), device)[:, None]
    place = merged.place.to(device)
    merged_key = 2 * place
    if required is not None:
        merged_key = merged_key - required.to(device).gather(1, place).long()
    key = [(2 * kept).masked_fill(kept < 0, behind), merged_key.masked_fill(~real, behind)]
    total = [a + b for a, b in zip(counts, merged.counts, strict=True)]
    order = torch.cat(key, dim=1).argsort(dim=1, stable=True)[:, : max(total)]
    return tokens_at(torch.cat([states, merged.hidden.to(states)], dim=1), order)


def report(parts: Sequence[Part], state: PromptState) -> None:
    """Put what the methods planned and measured where the trace finds it, prompt by prompt."""
    if len(parts) == 1 and parts[0].method is not None:
        return
    layers = state.shape.num_layers
    for part in parts:
        if part.method is None:
            part.state.schedule = [[n] * layers for n in part.state.prompts.num_visual]
    state.schedule = _by_prompt(parts, [part.state.schedule for part in parts])
    state.prunes = any(part.method is not None and part.state.prunes for part in parts)
    decisions = [part.state.decision for part in parts if part.state.decision is not None]
    state.decision = " ".join(dict.fromkeys(decisions)) or None
    information = [part.state.mutual_information for part in parts]
    state.mutual_information = _by_prompt(parts, information)


def _by_prompt(parts: Sequence[Part], values: Sequence[list[Any] | None]) -> list[Any] | None:
    """One entry for each prompt, None where its method has none; None if no method has any."""
    if all(own is None for own in values):
        return None
    whole: list[Any] = [None] * sum(len(part.prompts) for part in parts)
    for part, own in zip(parts, values, strict=True):
        for i, prompt in enumerate(part.prompts):
            whole[prompt] = None if own is None else own[i]
    return whole
