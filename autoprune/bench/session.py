"""A whole benchmark; variants take turns, so that a machine that gets slower hits all of them alike."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from ..methods.no_pruning import NoPruning
from .clock import Clock
from .floor import LayersAlone
from .measure import PHASES, Held, Launched, count_once, hold_once, time_once
from .subjects import Subject, Tensors
from .variants import HOOKS, OVERHEADS, PLAIN, Variant, overheads


@dataclass(frozen=True)
class Plan:
    """What to measure.

    batches: batch sizes; overheads are measured at the first.
    pruned: one per method and budget. keeps_all: one per method, with a budget of all tokens.
    repeats: rounds. steps: greedy steps after each prefill.
    """

    batches: Sequence[int]
    pruned: Sequence[Variant]
    keeps_all: Sequence[Variant]
    repeats: int
    steps: int

    @property
    def runs(self) -> int:
        """How many runs of the model `measure` makes."""
        floors = len(self.batches) * len(self.pruned)
        overheads = 1 + len(self.keeps_all) * (len(OVERHEADS) - 1)
        variants = len(self.batches) + floors + overheads
        return (variants + floors) * (1 + self.repeats)


@dataclass
class Measured:
    """One variant at one batch size; `seconds` has one entry per round for each phase.

    floor: prefill seconds of `LayersAlone` at the same lengths, for what is pruned.
    """

    batch: int
    variant: Variant
    held: Held
    launched: Launched | None
    seconds: dict[str, list[float]] = field(default_factory=lambda: {name: [] for name in PHASES})
    floor: list[float] = field(default_factory=list)


def measure(subject: Subject, plan: Plan, clock: Clock) -> Iterator[list[Measured]]:
    """After every run of the model, all that has been measured so far: one list that grows.

    Raises:
        ValueError, UnsupportedError: a method cannot prune the model.
    """
    done: list[Measured] = []
    for batch in plan.batches:
        prompts, first = subject.prompts(batch), len(done)
        if clock.on_gpu:
            # Libraries allocate workspaces at their first use; the plain model's peak is not to hold them.
            time_once(subject.model, prompts, None, plan.steps, clock)
        for variant in _variants(plan):
            done.append(_first_run(subject, prompts, batch, variant))
            yield done
        if batch == plan.batches[0]:
            for variant in _overheads(plan, done[1:]):
                done.append(_first_run(subject, prompts, batch, variant))
                yield done
        plain, *others = done[first:]
        floors = {
            own.variant: LayersAlone.like(own.held.samples)
            for own in others
            if own.variant.kind == "pruned"
        }
        for alone in floors.values():
            time_once(subject.model, prompts, alone, 0, clock)
            yield done
        for number in range(plan.repeats):
            # Another order in each round, so that none always follows the same one.
            random.Random(number).shuffle(others)
            for own in (plain, *others):
                model, method = subject.model, own.variant.method
                times = time_once(model, prompts, method, plan.steps, clock)
                for phase, seconds in times.items():
                    own.seconds[phase].append(seconds)
                yield done
                if own.variant in floors:
                    floor = time_once(model, prompts, floors[own.variant], 0, clock)
                    own.floor.append(floor["prefill"])
                    yield done


def _variants(plan: Plan) -> list[Variant]:
    return [Variant(PLAIN), *plan.pruned]


def _overheads(plan: Plan, pruned: Sequence[Measured]) -> list[Variant]:
    """Those of every method, at its cheapest budget."""
    found = [Variant(HOOKS, NoPruning())]
    for whole in plan.keeps_all:
        own = [each for each in pruned if each.variant.label == whole.label]
        cheapest = min(own, key=lambda each: sum(sample.flops for sample in each.held.samples))
        schedule = [sample.tokens_per_layer for sample in cheapest.held.samples]
        found += overheads(whole, cheapest.variant, schedule)
    return found


def _first_run(subject: Subject, prompts: Tensors, batch: int, variant: Variant) -> Measured:
    """What a variant holds, which warms it up, and what it launches."""
    arguments = subject.model, prompts, variant.method
    return Measured(batch, variant, hold_once(*arguments), count_once(*arguments))
