"""What a method decided, in the words of the slow oracle: columns that stay, and states they take on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from autoprune.contract import Observation, Ranking, Selection
from autoprune.methods.base import Method

Inputs = dict[str, torch.Tensor]
States = dict[int, tuple[torch.Tensor, torch.Tensor]]


@dataclass
class Decisions:
    """The cuts of one prefill: for each prompt the original visual index that every token stands at,
    and the states [tokens, hidden] that tokens take on there."""

    anchors: dict[int, list[torch.Tensor]] = field(default_factory=dict)
    states: dict[int, list[dict[int, torch.Tensor]]] = field(default_factory=dict)


class Spy(Method):
    """Decides as `method` does and writes it down."""

    name, paper = "spy", "none"

    def __init__(self, method: Method):
        self.method, self.budget, self.positions = method, method.budget, method.positions
        self.decisions: list[Decisions] = []
        # What was shown and what was answered, cut by cut.
        self.answers: list[tuple[Observation, Selection | Ranking | None]] = []
        self._present: list[torch.Tensor] = []
        self._required: Sequence[int] = ()

    def tower(self):
        return self.method.tower()

    def merge(self, seen, leaving):
        return self.method.merge(seen, leaving)

    def capacity(self, *size, **options):
        return self.method.capacity(*size, **options)

    def check(self, shape):
        self.method.check(shape)

    def begin(self, state):
        self.method.begin(state)
        self.decisions.append(Decisions())
        self._present = [torch.arange(n) for n in state.prompts.num_visual]
        self._required = state.prompts.required

    def needs(self, cut, state):
        return self.method.needs(cut, state)

    def select(self, seen: Observation, state) -> Selection | Ranking | None:
        selection = self.method.select(seen, state)
        self.answers.append((seen, selection))
        if isinstance(selection, Ranking):
            self._follow(seen.cut, selection, state.schedule)
            return selection
        if selection is None or (
            selection.merged is None and list(selection.counts) == list(seen.counts)
        ):
            return selection
        anchors, states = [], []
        for prompt, present in enumerate(self._present):
            required = self._required[prompt] > 0
            stands, becomes = _of_prompt(seen, selection, prompt, present, required)
            anchors.append(stands)
            states.append(becomes)
        self._present = anchors
        self.decisions[-1].anchors[seen.cut] = anchors
        self.decisions[-1].states[seen.cut] = states
        return selection

    def _follow(self, cut: int, ranking: Ranking, schedule: list[list[int]]) -> None:
        """Write down every cut that follows from a ranking: each keeps the best of what is there."""
        scores = [
            dict(zip(present.tolist(), row.tolist(), strict=False))
            for present, row in zip(self._present, ranking.scores, strict=True)
        ]
        for layer in range(cut, ranking.until):
            before = self._present
            self._present = [
                _best(present, scores[i], schedule[i][layer], self._required[i] > 0)
                for i, present in enumerate(before)
            ]
            if any(len(a) < len(b) for a, b in zip(self._present, before, strict=True)):
                self.decisions[-1].anchors[layer] = self._present
                self.decisions[-1].states[layer] = [{} for _ in before]


def _best(
    present: torch.Tensor, scores: dict[int, float], count: int, required: bool
) -> torch.Tensor:
    """The best `count` of the tokens present, in their order; the last one is among them if required."""
    order = sorted(present.tolist(), key=lambda i: (-scores[i], i))
    if required:
        last = int(present[-1])
        order.remove(last)
        order, count = [last, *order], max(count, 1)
    return torch.tensor(sorted(order[:count]), dtype=torch.long)


def _of_prompt(
    seen: Observation, selection: Selection, prompt: int, present: torch.Tensor, required: bool
) -> tuple[torch.Tensor, dict[int, torch.Tensor]]:
    kept = selection.kept[prompt, : selection.counts[prompt]]
    last = len(present) - 1
    displaces = required and last not in kept.tolist()
    stands, becomes = present[kept], {}
    if displaces:
        # The kept token that stands last gives way.
        stands = torch.cat([stands[:-1], present[-1:]])
    if (merged := selection.merged) is not None:
        places = present[merged.place[prompt, : merged.counts[prompt]]]
        assert not set(places.tolist()) & set(stands.tolist())
        becomes.update(zip(places.tolist(), merged.hidden[prompt].float(), strict=False))
        stands = torch.cat([stands, places])
    stands = stands.sort().values
    if selection.states is not None:
        # Of all that are left, in their order.
        becomes.update(zip(stands.tolist(), selection.states[prompt].float(), strict=False))
        if displaces:
            # It stays as it is. A tower that merges gave it another state than the oracle's.
            becomes[int(present[-1])] = seen.hidden()[prompt, last].float()
    return stands, becomes


def for_oracle(
    decisions: Decisions, inputs: Inputs, visual: torch.Tensor, num_layers: int
) -> tuple[list[torch.Tensor], States]:
    """`kept_columns` and `states` of the oracle.

    Args:
        visual: bool [batch, length], the visual tokens of the padded prompt.
    """
    real = inputs["attention_mask"].bool()
    columns = [row.nonzero().squeeze(1) for row in visual]
    kept, states, now = [], {}, real.clone()
    for layer in range(num_layers):
        if layer in decisions.anchors:
            now = real & ~visual
            for row, anchors in enumerate(decisions.anchors[layer]):
                now[row, columns[row][anchors]] = True
            states[layer] = _states_at(decisions.states[layer], columns, visual.shape)
        kept.append(now)
    return kept, {layer: given for layer, given in states.items() if given is not None}


def _states_at(becomes: list[dict[int, torch.Tensor]], columns: list[torch.Tensor], shape: Any):
    given = [(row, index, value) for row, one in enumerate(becomes) for index, value in one.items()]
    if not given:
        return None
    mask, values = torch.zeros(shape, dtype=torch.bool), torch.zeros(*shape, len(given[0][2]))
    for row, index, value in given:
        mask[row, columns[row][index]], values[row, columns[row][index]] = True, value
    return mask, values
